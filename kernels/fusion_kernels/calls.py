"""What the ops do: which implementation runs a call, and into which memory.

Checks, the choice, strides and the plan of the kernels are worked out once for all calls that look the same: a call costs one
key and what its implementation costs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import choice, cpu, cudnn, reference, tiled
from .blanks import Blank, Place
from .checking import check
from .keys import Plans, number, signature
from .program import Program, parse

__all__ = ["attention", "attention_backward"]

Forward = Callable[..., tuple[Tensor, Tensor]]  # of (q, k, v, captures, params, seed)
Backward = Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]  # of (do, q, k, v, captures, params, seed, out, lse)

_forwards: dict[Hashable, Forward] = Plans()
_backwards: dict[Hashable, Backward] = Plans()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    params: Sequence[int],
    program: str,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse); see `op`."""
    numbers = tuple(map(number, params)) if params else ()
    key = program, dropout_p, choice.state(q.dtype), numbers, signature(q, k, v, seed, *captures)
    run = _forwards.get(key)
    if run is None:
        run = _forwards[key] = _forward(q, k, v, captures, params, program, dropout_p, seed)
    return run(q, k, v, captures, params, seed)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    params: Sequence[int],
    text: str,
    dropout_p: float,
    seed: Tensor | None,
) -> Forward:
    program = parse(text)
    check(q, k, v, captures, params, program, dropout_p, seed)
    way = choice.choose(q, k, v, captures, program, dropout_p, None)
    batch, heads, n = q.shape[:3]
    out = Blank.nested((batch, heads, n, v.shape[3]), q, v.dtype)
    lse = Blank.contiguous((batch, heads, n), reference.compute_dtype(q.dtype), q.device)

    if way == "triton":
        from .forward import plan

        fill = plan(q, k, v, captures, program, dropout_p, out.shadow())
    else:
        fill = partial(_tiled_forward, program, dropout_p)

    place, new_out, new_lse = Place(q.device), out.maker(), lse.maker()

    def filled(*arguments: Any) -> tuple[Tensor, Tensor]:
        if not place.current():
            with place.entered():
                return filled(*arguments)
        result = new_out(), new_lse()
        fill(*arguments, *result)
        return result

    if way in ("triton", "tiled"):
        return filled

    def settled(*arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, captures, params, seed = arguments
        if way == "cudnn":
            done = cudnn.attention_forward(q, k, v, program)
        elif way == "aten":
            done = cpu.attention_forward(q, k, v, captures, params, program)
        else:
            done = reference.dense(q, k, v, captures, params, program, dropout_p, seed)
        if done is None:
            return filled(*arguments)
        return out.settle(done[0]), lse.settle(done[1])

    return settled


def _tiled_forward(program: Program, dropout_p: float, *arguments: Any) -> None:
    q, k, v, captures, params, seed, out, lse = arguments
    tiled.tiled_forward(q, k, v, captures, params, program, dropout_p, seed, out, lse)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    params: Sequence[int],
    program: str,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dq, dk, dv, [gradients of the captures that `needs` flags]); see `op`."""
    numbers = tuple(map(number, params)) if params else ()
    look = signature(do, q, k, v, seed, out, lse, *captures)
    key = program, dropout_p, choice.state(q.dtype), numbers, look, tuple(needs)
    run = _backwards.get(key)
    if run is None:
        run = _backwards[key] = _backward(do, q, k, v, captures, program, dropout_p, out, lse, needs)
    return run(do, q, k, v, captures, params, seed, out, lse)


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    text: str,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    needs: Sequence[bool],
) -> Backward:
    program = parse(text)
    way = choice.choose(q, k, v, captures, program, dropout_p, needs)
    blanks = [Blank.nested(x.shape, x, x.dtype) for x in (q, k, v)]
    wide = reference.compute_dtype(q.dtype)
    fill: Callable[..., None]

    if way == "triton":
        from . import backward

        stored = backward.stored(program, captures, needs, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
        gradients = _Gradients(captures, needs, wide, stored)
        dq, dk, dv = (blank.shadow() for blank in blanks)
        fill = backward.plan(do, q, k, v, captures, program, dropout_p, out, lse, needs, dq, dk, dv, gradients.shadows())
    else:
        gradients = _Gradients(captures, needs, wide, set())
        by = reference.dense_backward if way == "dense" else tiled.tiled_backward
        fill = partial(_plain_backward, by, program, dropout_p, tuple(needs))

    place, (new_dq, new_dk, new_dv) = Place(q.device), [blank.maker() for blank in blanks]

    def filled(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        if not place.current():
            with place.entered():
                return filled(*arguments)
        dq, dk, dv = new_dq(), new_dk(), new_dv()
        sums = gradients.new()
        fill(*arguments, dq, dk, dv, sums)
        return dq, dk, dv, gradients.done(sums)

    if way != "cudnn":
        return filled

    def settled(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        do, q, k, v, _, _, _, out, lse = arguments
        done = cudnn.attention_backward(do, q, k, v, program, out, lse)
        if done is None:
            return filled(*arguments)
        dq, dk, dv = [blank.settle(gradient) for blank, gradient in zip(blanks, done, strict=True)]
        return dq, dk, dv, []  # `choose` does not take it where a capture needs a gradient

    return settled


def _plain_backward(by: Callable[..., None], program: Program, dropout_p: float, needs: Sequence[bool], *arguments: Any) -> None:
    do, q, k, v, captures, params, seed, out, lse, *results = arguments
    by(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs, *results)


class _Gradients:
    """The gradients of captures: sums in a wide dtype, except those that the implementation stores whole, in their own."""

    def __init__(self, captures: Sequence[Tensor], needs: Sequence[bool], wide: torch.dtype, stored: set[int]) -> None:
        self.dtypes = [c.dtype for c in captures]
        self.stored = stored
        self.blanks = [
            Blank.contiguous(c.shape, c.dtype if i in stored else wide, c.device) if need else None
            for i, (c, need) in enumerate(zip(captures, needs, strict=True))
        ]
        self.makers = [blank and blank.maker() for blank in self.blanks]

    def shadows(self) -> list[Tensor | None]:
        return [blank and blank.shadow() for blank in self.blanks]

    def new(self) -> list[Tensor | None]:
        """What the implementation adds to, or stores: one for each capture, None where no gradient is needed."""
        return [None if make is None else make() if i in self.stored else make().zero_() for i, make in enumerate(self.makers)]

    def done(self, sums: list[Tensor | None]) -> list[Tensor]:
        """The gradients in the dtypes of the captures, of those that need one."""
        return [total.to(dtype) for total, dtype in zip(sums, self.dtypes, strict=True) if total is not None]
