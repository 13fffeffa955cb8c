"""The custom ops: schema, fake, autograd and the choice of implementation.

    attention(q, k, v, captures, params, program, dropout_p, seed) -> (out, lse)
    attention_backward(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs) -> (dq, dk, dv, dcaptures)

q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), any strides; out (B, H, N, Dv) in v's dtype and q's memory order; lse
(B, H, N) fp32 in base 2. The score program travels as text: it is in every compile cache's key. So is the ops' name, which ends
in a hash of this package's sources: a cache never serves what an older formula compiled to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import choice, cpu, cudnn, reference, tiled
from .checking import check
from .keys import Plans, signature
from .program import Program, parse

__all__ = ["ATTENTION", "ATTENTION_BACKWARD", "VERSION"]


def _version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


VERSION = _version()

# ---------------------------------------------------------------- memory order


def _less(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a < b)


def _strides(shape: Sequence[Any], like: Tensor) -> tuple[Any, ...]:
    """Of a dense tensor whose first three dims are nested in memory as `like`'s are, the last dim innermost."""
    order = [0, 1, 2]
    for i in (1, 2):  # insertion sort by falling stride; a dim that cannot be compared keeps its place
        for j in range(i, 0, -1):
            if not _less(like.stride(order[j - 1]), like.stride(order[j])):
                break
            order[j - 1], order[j] = order[j], order[j - 1]
    strides: list[Any] = [0, 0, 0, 1]
    step = shape[3]
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return tuple(strides)


def _empty(shape: Sequence[Any], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(shape), _strides(shape, like), dtype=dtype, device=like.device)


def _attention_fake(q, k, v, captures, params, program, dropout_p, seed):
    lse = q.new_empty(q.shape[:3], dtype=reference.compute_dtype(q.dtype))
    return _empty((*q.shape[:3], v.shape[3]), q, v.dtype), lse


def _attention_backward_fake(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs):
    dcaptures = [c.new_empty(c.shape if need else (0,)) for c, need in zip(captures, needs, strict=True)]
    return *(_empty(x.shape, x, x.dtype) for x in (q, k, v)), dcaptures


def _settle(value: Tensor, promised: _Blank) -> Tensor:
    """`value` with the strides and the dtype that the fake promised."""
    if value.dtype == promised.dtype and all(
        n == 1 or a == b for n, a, b in zip(value.shape, value.stride(), promised.strides, strict=True)
    ):
        return value
    return promised.new().copy_(value)


# ---------------------------------------------------------------- the ops


@dataclass(frozen=True)
class _Blank:
    """An empty tensor to be."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> _Blank:
        return _Blank(tuple(shape), _strides(shape, like), dtype, like.device)

    def new(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Call:
    """What is known of a call from what its arguments look like, their values apart. blanks: out and lse, or dq, dk and dv."""

    program: Program
    way: str
    blanks: tuple[_Blank, ...]


_calls: dict[Hashable, _Call] = Plans()


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    params: Sequence[int],
    program: str,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    key = (program, dropout_p, choice.state(), len(params), signature(q, k, v, seed, *captures))
    call = _calls.get(key)
    if call is None:
        parsed = parse(program)
        check(q, k, v, captures, params, parsed, dropout_p, seed)
        way = choice.choose(q, k, v, captures, parsed, dropout_p, None)
        out = _Blank.of((*q.shape[:3], v.shape[3]), q, v.dtype)
        n, (batch, heads) = q.shape[2], q.shape[:2]
        lse = _Blank((batch, heads, n), (heads * n, n, 1), reference.compute_dtype(q.dtype), q.device)
        call = _calls[key] = _Call(parsed, way, (out, lse))
    parsed, way, (out, lse) = call.program, call.way, call.blanks
    done = None
    if way == "cudnn":
        done = cudnn.attention_forward(q, k, v, parsed)
    elif way == "aten":
        done = cpu.attention_forward(q, k, v, captures, params, parsed)
    elif way == "dense":
        done = reference.dense(q, k, v, captures, params, parsed, dropout_p, seed)
    if done is not None:
        return _settle(done[0], out), _settle(done[1], lse)
    result = out.new(), lse.new()
    if way == "triton":
        from .forward import attention_forward

        attention_forward(q, k, v, captures, params, parsed, dropout_p, seed, *result, key=key)
    else:
        tiled.tiled_forward(q, k, v, captures, params, parsed, dropout_p, seed, *result)
    return result


def _attention_backward(
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
    key = (program, dropout_p, choice.state(), tuple(needs), signature(do, q, k, v, out, lse, *captures))
    call = _calls.get(key)
    if call is None:
        parsed = parse(program)
        way = choice.choose(q, k, v, captures, parsed, dropout_p, needs)
        call = _calls[key] = _Call(parsed, way, tuple(_Blank.of(x.shape, x, x.dtype) for x in (q, k, v)))
    parsed, way = call.program, call.way
    done = None
    if way == "cudnn":
        done = cudnn.attention_backward(do, q, k, v, parsed, out, lse)
    elif way == "aten":
        done = cpu.attention_backward(do, q, k, v, captures, params, parsed, out, lse)
    if done is not None:
        dq, dk, dv = (_settle(gradient, blank) for gradient, blank in zip(done, call.blanks, strict=True))
        return dq, dk, dv, [c.new_empty(0) for c in captures]
    dq, dk, dv = (blank.new() for blank in call.blanks)
    dcaptures = [c.new_empty(c.shape if need else (0,)) for c, need in zip(captures, needs, strict=True)]
    backward, stored = _backward_of(way, call, q, k, captures, needs, key)
    wide = reference.compute_dtype(q.dtype)
    sums = [
        None if not need else dcapture if i in stored else c.new_zeros(c.shape, dtype=wide)
        for i, (c, need, dcapture) in enumerate(zip(captures, needs, dcaptures, strict=True))
    ]
    backward(do, q, k, v, captures, params, parsed, dropout_p, seed, out, lse, needs, dq, dk, dv, sums)
    for total, dcapture in zip(sums, dcaptures, strict=True):
        if total is not None and total is not dcapture:
            dcapture.copy_(total)
    return dq, dk, dv, dcaptures


def _backward_of(
    way: str, call: _Call, q: Tensor, k: Tensor, captures: Sequence[Tensor], needs: Sequence[bool], key: Hashable
) -> tuple[Callable[..., None], set[int]]:
    """The implementation, and the captures whose gradients it stores whole, in their own dtype."""
    if way == "dense":
        return reference.dense_backward, set()
    if way != "triton":
        return tiled.tiled_backward, set()
    from . import backward

    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    stored = backward.stored(call.program, captures, needs, sizes) if any(needs) else set()
    return partial(backward.attention_backward, key=key), stored


# ---------------------------------------------------------------- autograd


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, captures, params, program, dropout_p, seed = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, seed, out, lse, *captures)
    ctx.params, ctx.program, ctx.dropout_p = params, program, dropout_p
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, do: Tensor, _: Tensor | None) -> tuple:
    q, k, v, seed, out, lse, *captures = ctx.saved_tensors
    needs = [bool(need) and c.is_floating_point() for need, c in zip(ctx.needs_input_grad[3], captures, strict=True)]
    dq, dk, dv, dcaptures = ATTENTION_BACKWARD(
        do, q, k, v, captures, ctx.params, ctx.program, ctx.dropout_p, seed, out, lse, needs
    )
    dcaptures = [d if need else None for d, need in zip(dcaptures, needs, strict=True)]
    no_params = None if ctx.params else []  # the structure of the inputs, as torch.library compares it
    return dq, dk, dv, dcaptures, no_params, None, None, None


def _twice(ctx: Any, *grads: Any) -> tuple:
    raise RuntimeError(
        "fusion_kernels: attention was differentiated twice; the fused backward has no gradient of its own. "
        "Run this model without the fusion (or call fusion_kernels.reference.dense, which torch can differentiate again)."
    )


# ---------------------------------------------------------------- registration

# Straight to the dispatcher: `torch.library.custom_op` looks at every call for outputs that alias inputs, which took longer
# than the launch of a kernel (100 us a call under torch 2.11).
_LIBRARY = torch.library.Library("fusion_kernels", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] params, str program, float dropout_p, Tensor? seed"


def _register(name: str, schema: str, implementation: Any, fake: Any, backward: Any, setup: Any) -> torch._ops.OpOverload:
    _LIBRARY.define(f"{name}{schema}", tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusion_kernels::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fusion_kernels::{name}", backward, setup_context=setup, lib=_LIBRARY)
    return getattr(torch.ops.fusion_kernels, name).default


ATTENTION: torch._ops.OpOverload = _register(
    f"attention_{VERSION}", f"({_INPUTS}) -> (Tensor, Tensor)", _attention, _attention_fake, _backward, _setup
)
ATTENTION_BACKWARD: torch._ops.OpOverload = _register(
    f"attention_backward_{VERSION}",
    f"(Tensor do, {_INPUTS}, Tensor out, Tensor lse, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor[])",
    _attention_backward,
    _attention_backward_fake,
    _twice,
    None,
)
