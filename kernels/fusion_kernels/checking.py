"""Bad input to the op: each message names the argument, what it is, and what was needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .program import Capture, Program

__all__ = ["check"]

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
