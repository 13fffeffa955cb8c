"""The custom ops: schema, fake, autograd and the choice of implementation.

    attention(q, k, v, captures, params, program, dropout_p, seed) -> (out, lse)
    attention_backward(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs) -> (dq, dk, dv, dcaptures)

q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), any strides; out (B, H, N, Dv) in v's dtype and q's memory order; lse
(B, H, N) fp32 in base 2. The score program travels as text: it is in every compile cache's key. So is the ops' name, which ends
in a hash of this package's sources: a cache never serves what an older formula compiled to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import choice, cpu, cudnn, reference, tiled
from .checking import check
from .program import parse

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


def _like(shape: Sequence[Any], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of that memory order."""
    return torch.empty_strided(tuple(shape), _strides(shape, like), dtype=dtype, device=like.device)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = _like((*q.shape[:3], v.shape[3]), q, v.dtype)
    return out, q.new_empty(q.shape[:3], dtype=reference.compute_dtype(q.dtype))


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dcaptures = [c.new_empty(c.shape if need else (0,)) for c, need in zip(captures, needs, strict=True)]
    return _like(q.shape, q, q.dtype), _like(k.shape, k, k.dtype), _like(v.shape, v, v.dtype), dcaptures


def _settle(value: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """`value` with the strides that the fake promised for that shape in `like`'s memory order."""
    promised = _strides(shape, like)
    if all(n == 1 or a == b for n, a, b in zip(shape, value.stride(), promised, strict=True)):
        return value
    return torch.empty_strided(tuple(shape), promised, dtype=value.dtype, device=value.device).copy_(value)


# ---------------------------------------------------------------- the ops


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
    parsed = parse(program)
    check(q, k, v, captures, params, parsed, dropout_p, seed)
    way = choice.choose(q, k, v, captures, parsed, dropout_p, None)
    if way == "cudnn":
        out, lse = cudnn.attention_forward(q, k, v, parsed)
        return _settle(out, (*q.shape[:3], v.shape[3]), q), lse
    if way == "aten":
        done = cpu.attention_forward(q, k, v, captures, params, parsed)
        if done is not None:
            return _settle(done[0], (*q.shape[:3], v.shape[3]), q), done[1].contiguous()
        way = "tiled"
    out, lse = _outputs(q, v)
    if way == "dense":
        results = reference.dense(q, k, v, captures, params, parsed, dropout_p, seed)
        return out.copy_(results[0]), lse.copy_(results[1])
    if way == "tiled":
        tiled.tiled_forward(q, k, v, captures, params, parsed, dropout_p, seed, out, lse)
        return out, lse
    from .forward import attention_forward

    attention_forward(q, k, v, captures, params, parsed, dropout_p, seed, out, lse)
    return out, lse


def _attention_fake(q, k, v, captures, params, program, dropout_p, seed):
    return _outputs(q, v)


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
    parsed = parse(program)
    way = choice.choose(q, k, v, captures, parsed, dropout_p, needs)
    done = None
    if way == "cudnn":
        done = cudnn.attention_backward(do, q, k, v, parsed, out, lse)
    elif way == "aten":
        done = cpu.attention_backward(do, q, k, v, captures, params, parsed, out, lse)
    if done is not None:
        dq, dk, dv = (_settle(g, x.shape, x) for g, x in zip(done, (q, k, v), strict=True))
        return dq, dk, dv, [c.new_empty(0) for c in captures]
    dq, dk, dv, dcaptures = _gradients(q, k, v, captures, needs)
    stored: set[int] = set()
    if way == "triton":
        from . import backward

        attention_backward = backward.attention_backward
        if any(needs):
            stored = backward.stored(parsed, captures, needs, (*q.shape[:3], k.shape[2]))
    else:
        attention_backward = reference.dense_backward if way == "dense" else tiled.tiled_backward
    wide = reference.compute_dtype(q.dtype)
    sums = [
        None if not need else dcapture if i in stored else c.new_zeros(c.shape, dtype=wide)
        for i, (c, need, dcapture) in enumerate(zip(captures, needs, dcaptures, strict=True))
    ]
    attention_backward(do, q, k, v, captures, params, parsed, dropout_p, seed, out, lse, needs, dq, dk, dv, sums)
    for total, dcapture in zip(sums, dcaptures, strict=True):
        if total is not None and total is not dcapture:
            dcapture.copy_(total)
    return dq, dk, dv, dcaptures


def _attention_backward_fake(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs):
    return _gradients(q, k, v, captures, needs)


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
