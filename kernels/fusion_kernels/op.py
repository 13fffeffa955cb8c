"""The custom ops: schema, fake, autograd and the choice of implementation.

    attention(q, k, v, captures, params, program, dropout_p, seed) -> (out, lse)
    attention_backward(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs) -> (dq, dk, dv, dcaptures)

q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), any strides; out (B, H, N, Dv) in v's dtype and q's memory order; lse
(B, H, N) fp32 in base 2. The score program travels as text: it is in every compile cache's key. So is the ops' name, which ends
in a hash of this package's sources: a cache never serves what an older formula compiled to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cpu, reference, tiled
from .program import Capture, Program, parse

__all__ = ["ATTENTION", "ATTENTION_BACKWARD", "VERSION", "check", "force", "kernel_for"]

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


VERSION = _version()

# ---------------------------------------------------------------- which implementation

IMPLEMENTATIONS = ("triton", "aten", "tiled", "dense")
_forced: str | None = None


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Runs every call inside with one implementation, forward and backward, in all threads; for tests and measurements.

    Args:
        implementation: "triton" (on CPU tensors through Triton's interpreter, which TRITON_INTERPRET=1 turns on before
            Triton is imported), "aten", "tiled" or "dense".

    Raises:
        ValueError: the name is none of these.
    """
    global _forced
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"fusion_kernels: no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def _interpreting() -> bool:
    return os.environ.get("FUSION_KERNELS_INTERPRET", "0") not in ("", "0")


def kernel_for(
    device: torch.device | str,
    dtype: torch.dtype,
    v_dtype: torch.dtype,
    program: Program,
    dropout_p: float = 0.0,
    *,
    same_head_dim: bool = True,
    capture_grads: bool = False,
) -> str:
    """The implementation that a call would run: "triton", "aten-cpu" or "tiled" ("dense" only when forced).

    Single calls may still go from ATen to the tiled reference: those whose mask hides every key of a row.

    Args:
        device: of all tensors. dtype: of q and k. v_dtype: of v.
        same_head_dim: whether v's head dim is q's. capture_grads: whether a captured tensor needs a gradient.
    """
    if _forced is not None:
        return {"aten": "aten-cpu"}.get(_forced, _forced)
    if torch.device(device).type != "cpu" or _interpreting():
        return "triton"
    fits = cpu.form(program) is not None and same_head_dim and v_dtype == dtype and not dropout_p and not capture_grads
    return "aten-cpu" if fits else "tiled"


def _choose(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], program: Program, dropout_p: float, needs: Sequence[bool]
) -> str:
    if _forced is not None:
        return _forced
    if q.device.type != "cpu" or _interpreting():
        return "triton"
    return "aten" if cpu.supports(q, k, v, captures, program, dropout_p, needs) else "tiled"


# ---------------------------------------------------------------- memory order


def _less(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a < b)


def _like(shape: Sequence[Any], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty dense tensor whose first three dims are nested in memory as `like`'s are, the last dim innermost."""
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
    return torch.empty_strided(tuple(shape), strides, dtype=dtype, device=like.device)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = _like((*q.shape[:3], v.shape[3]), q, v.dtype)
    return out, q.new_empty(q.shape[:3], dtype=reference.compute_dtype(q.dtype))


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dcaptures = [c.new_empty(c.shape if need else (0,)) for c, need in zip(captures, needs, strict=True)]
    return _like(q.shape, q, q.dtype), _like(k.shape, k, k.dtype), _like(v.shape, v, v.dtype), dcaptures


def _settle(value: Tensor, promised: Tensor) -> Tensor:
    """`value` with the strides that the fake promised."""
    strides = zip(value.shape, value.stride(), promised.stride(), strict=True)
    return value if all(n == 1 or a == b for n, a, b in strides) else promised.copy_(value)


# ---------------------------------------------------------------- the ops


@torch.library.custom_op(
    f"fusion_kernels::attention_{VERSION}",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] params, str program, float dropout_p, Tensor? seed) "
    "-> (Tensor, Tensor)",
)
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
    choice = _choose(q, k, v, captures, parsed, dropout_p, ())
    out, lse = _outputs(q, v)
    if choice == "aten":
        done = cpu.attention_forward(q, k, v, captures, params, parsed)
        if done is not None:
            return _settle(done[0], out), lse.copy_(done[1])
        choice = "tiled"
    if choice == "dense":
        results = reference.dense(q, k, v, captures, params, parsed, dropout_p, seed)
        return out.copy_(results[0]), lse.copy_(results[1])
    if choice == "tiled":
        tiled.tiled_forward(q, k, v, captures, params, parsed, dropout_p, seed, out, lse)
        return out, lse
    from .forward import attention_forward

    attention_forward(q, k, v, captures, params, parsed, dropout_p, seed, out, lse)
    return out, lse


@_attention.register_fake
def _(q, k, v, captures, params, program, dropout_p, seed):
    return _outputs(q, v)


@torch.library.custom_op(
    f"fusion_kernels::attention_backward_{VERSION}",
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] params, str program, float dropout_p, "
    "Tensor? seed, Tensor out, Tensor lse, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor[])",
)
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
    choice = _choose(q, k, v, captures, parsed, dropout_p, needs)
    if choice == "aten" and out.itemsize == 2 and _forced is None:
        # ATen takes delta = sum(do * out) from the rounded out: a row of ds no longer sums to zero, and what adds up over keys
        # (the gradient of a key bias) is 2 to 4 times as wrong as eager's
        choice = "tiled"
    dq, dk, dv, dcaptures = _gradients(q, k, v, captures, needs)
    if choice == "aten":
        done = cpu.attention_backward(do, q, k, v, captures, params, parsed, out, lse)
        if done is not None:
            return _settle(done[0], dq), _settle(done[1], dk), _settle(done[2], dv), dcaptures
        choice = "tiled"
    wide = reference.compute_dtype(q.dtype)
    sums = [c.new_zeros(c.shape, dtype=wide) if need else None for c, need in zip(captures, needs, strict=True)]
    arguments = (do, q, k, v, captures, params, parsed, dropout_p, seed, out, lse, needs, dq, dk, dv, sums)
    if choice == "dense":
        reference.dense_backward(*arguments)
    elif choice == "tiled":
        tiled.tiled_backward(*arguments)
    else:
        from .backward import attention_backward

        attention_backward(*arguments)
    for total, dcapture in zip(sums, dcaptures, strict=True):
        if total is not None:
            dcapture.copy_(total)
    return dq, dk, dv, dcaptures


@_attention_backward.register_fake
def _(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs):
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


torch.library.register_autograd(f"fusion_kernels::attention_{VERSION}", _backward, setup_context=_setup)
torch.library.register_autograd(f"fusion_kernels::attention_backward_{VERSION}", _twice)

ATTENTION: torch._ops.OpOverload = getattr(torch.ops.fusion_kernels, f"attention_{VERSION}").default
ATTENTION_BACKWARD: torch._ops.OpOverload = getattr(torch.ops.fusion_kernels, f"attention_backward_{VERSION}").default


# ---------------------------------------------------------------- bad input


def _bad(seen: str, needed: str) -> ValueError:
    return ValueError(f"fusion_kernels: {seen}; needed: {needed}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q has shape {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"


def _kind(dtype: torch.dtype) -> str:
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    params: Sequence[int],
    program: Program,
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Raises ValueError, naming the argument, what it is and what was needed, if the op cannot take these inputs."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        allowed = (*DTYPES, torch.float64) if t.device.type == "cpu" else DTYPES
        if t.dim() != 4:
            raise _bad(f"{name} has shape {tuple(t.shape)}", "4 dims (batch, heads, length, head dim)")
        if t.device != q.device:
            raise _bad(f"{name} is on {t.device} and q on {q.device}", "one device")
        if t.dtype not in allowed:
            raise _bad(f"{name} has dtype {t.dtype} on {t.device}", " or ".join(str(d) for d in allowed))
        if not 1 <= t.shape[3] <= MAX_HEAD_DIM:
            raise _bad(f"{name} has shape {tuple(t.shape)}", f"a head dim (the last) from 1 to {MAX_HEAD_DIM}")
    if q.device.type not in ("cpu", "cuda"):
        raise _bad(f"q is on {q.device}", "a CPU or CUDA tensor")
    if q.dtype != k.dtype:
        raise _bad(f"q has dtype {q.dtype} and k {k.dtype}", "one dtype for q and k")
    if q.shape[3] != k.shape[3]:
        raise _bad(_shapes(q, k, v), "one head dim (the last) for q and k")
    if q.shape[0] != k.shape[0]:
        raise _bad(_shapes(q, k, v), "one batch size (the first dim)")
    if k.shape[:3] != v.shape[:3]:
        raise _bad(_shapes(q, k, v), "one batch size, number of heads and length for k and v")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise _bad(
            _shapes(q, k, v), "a number of query heads (the second dim of q) that is a multiple of the number of key heads"
        )
    if len(captures) != len(program.captures) or len(params) != program.params:
        needed = f"{len(program.captures)} captures and {program.params} params: the program reads them"
        raise _bad(f"{len(captures)} captures and {len(params)} params were passed", needed)
    for i, (c, expected) in enumerate(zip(captures, program.captures, strict=True)):
        if Capture(_kind(c.dtype), c.dim()) != expected:
            found = f"captures[{i}] is {_kind(c.dtype)} of shape {tuple(c.shape)}"
            raise _bad(found, f"{expected.kind} with {expected.rank} dims")
        if c.device != q.device:
            raise _bad(f"captures[{i}] is on {c.device} and q on {q.device}", "one device")
    if not 0 <= dropout_p <= 1:
        raise _bad(f"dropout_p is {dropout_p}", "a probability from 0 to 1")
    if dropout_p and seed is None:
        raise _bad("dropout_p is set without a seed", f"seed: a 0-d int64 tensor on {q.device}")
    if dropout_p and seed is not None and (seed.dim() or seed.dtype != torch.int64 or seed.device != q.device):
        found = f"seed has shape {tuple(seed.shape)}, dtype {seed.dtype}, on {seed.device}"
        raise _bad(found, f"a 0-d int64 tensor on {q.device}")
