"""Bad input to the op: each message names the argument, what it is, and what was needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .extents import extents
from .program import Capture, Program

__all__ = ["check", "check_dense", "check_dropout", "check_operands", "check_program"]

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
    """Raises ValueError, naming the argument, what it is and what was needed, if the op cannot take these inputs.

    Captures have to hold every element that the program reads, as far as `extents` knows it: plain indices, and sums,
    quotients and extrema of them; not indices that tensors hold.
    """
    check_operands(q, k, v)
    check_program(q, k, captures, params, program)
    check_dropout(q, dropout_p, seed)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_dense(name, t)
        allowed = (*DTYPES, torch.float64) if t.device.type == "cpu" else DTYPES
        if t.dim() != 4:
            raise _bad(f"{name} has shape {tuple(t.shape)}", "4 dims (batch, heads, length, head dim)")
        if t.device != q.device:
            raise _bad(f"{name} is on {t.device} and q on {q.device}", f"one device: {name}.to(q.device)")
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


def check_dense(name: str, t: Tensor) -> None:
    if t.is_nested:
        raise _bad(f"{name} is a nested tensor", f"a dense one: {name}.to_padded_tensor(0.0), and a mask for the padding")
    if t.layout != torch.strided:
        raise _bad(f"{name} has layout {t.layout}", f"a dense tensor: {name}.to_dense()")


def check_program(q: Tensor, k: Tensor, captures: Sequence[Tensor], params: Sequence[int], program: Program) -> None:
    if len(captures) != len(program.captures) or len(params) != program.params:
        needed = f"{len(program.captures)} captures and {program.params} params: the program reads them"
        raise _bad(f"{len(captures)} captures and {len(params)} params were passed", needed)
    for i, (c, expected) in enumerate(zip(captures, program.captures, strict=True)):
        check_dense(f"captures[{i}]", c)
        if Capture(_kind(c.dtype), c.dim()) != expected:
            found = f"captures[{i}] is {_kind(c.dtype)} of shape {tuple(c.shape)}"
            raise _bad(found, f"{expected.kind} with {expected.rank} dims")
        if c.device != q.device:
            raise _bad(f"captures[{i}] is on {c.device} and q on {q.device}", f"one device: captures[{i}].to(q.device)")
    if not captures:
        return
    for read in extents(program, (*q.shape[:3], k.shape[2]), params):
        shape = captures[read.capture].shape
        length = shape[read.dim]
        below = read.first is not None and read.first < 0
        beyond = read.last is not None and type(length) is int and read.last >= length
        if not (below or beyond):
            continue
        seen = f"captures[{read.capture}] has shape {tuple(shape)} and is read at {read.at} in dim {read.dim}"
        of = f"for q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)}"
        if below:
            raise _bad(f"{seen}, from {read.first}", f"an index from 0, {of}")
        hint = " (a dim of one is read at the constant 0)" if length == 1 else ""
        raise _bad(f"{seen}, up to {read.last}", f"at least {(read.last or 0) + 1} there, {of}{hint}")


def check_dropout(q: Tensor, dropout_p: float, seed: Tensor | None) -> None:
    if not 0 <= dropout_p <= 1:
        raise _bad(f"dropout_p is {dropout_p}", "a probability from 0 to 1")
    if dropout_p and seed is None:
        raise _bad("dropout_p is set without a seed", f"seed: a 0-d int64 tensor on {q.device}")
    if dropout_p and seed is not None and (seed.dim() or seed.dtype != torch.int64 or seed.device != q.device):
        found = f"seed has shape {tuple(seed.shape)}, dtype {seed.dtype}, on {seed.device}"
        raise _bad(found, f"a 0-d int64 tensor on {q.device}")
