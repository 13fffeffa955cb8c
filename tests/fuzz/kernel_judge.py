"""One written score program through the Triton kernels, beside a dense reference in float64 and in its own dtype.

Imported where Triton runs: in the worker process that interprets it, and on a GPU.

The rule is that of `triton_cases`: twice eager's error, and a few roundings. Over several draws, for eager's own error belongs to
the program and not to one draw of its tensors. One more term is needed where gradients cancel (one key: exactly):

    p  = 2^(x log2(e) - L)      L, the row's log-sum-exp, is rounded: p is off by ln(2) |L| roundings, which eager's is not
    dx = p (dp - sum_k p dp)    eager forms both terms from the same rounded dp, and what they share cancels to the last bit; a
                                fused backward has the sum as do . out, rounded on its own (FlashAttention-2, arXiv 2307.08691)

So a gradient may be wrong by ``TERMS + ln(2) |L|`` fp32 roundings of what it would be if nothing cancelled, row by row; and by
what half a unit of each element of out, as it is stored, makes of do . out.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from fusion_kernels import reference
from fusion_kernels.derivative import vjp
from fusion_kernels.evaluate import evaluate, scatter
from fusion_kernels.program import parse
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import triton_cases
from key_mask_cases import few_scores
from triton_cases import OUTPUTS, Case, Operands, Shape

from fuzz.inputs import make
from fuzz.scores import Scored

__all__ = ["judge"]

SEED = 987654321987  # of dropout: more than 32 bits
DRAWS = 4
TERMS = 8  # roundings of dp and of do . out, four each: sums of at most a few hundred products
EPS = torch.finfo(torch.float32).eps
DEEP = -500.0  # rows with an L below are held as a maximum and a sum apart (`backward_rows.deep_rows`)


@dataclass
class _Draw:
    """What one draw of the tensors is run on."""

    x: Operands
    captures: list[Tensor]
    case: Case

    @classmethod
    def of(cls, s: Scored, device: str, seed: int) -> _Draw:
        shape, dtype = Shape(*s.shape), getattr(torch, s.dtype)
        torch.manual_seed(seed)
        x = triton_cases.operands(shape, dtype, device, s.transposed)
        if s.poison is not None:
            x.q[-1, -1, shape.n // 2, 0] = s.poison
        captures = [c.to(device) for c in make(s.captures, dtype, seed)]
        return cls(x, captures, Case(parse(s.text), captures, s.params))


def _results(s: Scored, device: str, seed: int) -> list[tuple[float, float, float]]:
    """(error of the kernels, error of eager, the size both are measured by) of each output, as `triton_cases.compare` does."""
    shape, dtype = Shape(*s.shape), getattr(torch, s.dtype)
    d = _Draw.of(s, device, seed)
    keep = triton_cases.keep_mask(SEED, shape, s.dropout).to(device) if s.dropout else None
    exact = triton_cases.dense(d.x, d.case, d.captures, torch.float64, s.dropout, keep)
    eager = triton_cases.dense(d.x, d.case, d.captures, dtype, s.dropout, keep)
    ours = triton_cases.fused(d.x, d.case, d.captures, s.dropout, torch.tensor(SEED, device=device) if s.dropout else None)
    sizes = [_largest(e) for e in exact]
    both = [(triton_cases.distance(o, e), triton_cases.distance(r, e)) for o, r, e in zip(ours, eager, exact, strict=True)]
    return [(*pair, size if size > 1e-3 else 30.0) for pair, size in zip(both, sizes, strict=True)]


def _largest(t: Tensor) -> float:
    return t.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if t.numel() else 0.0


def _uncancelled(s: Scored, device: str, seed: int) -> list[float]:
    """What the gradients may be wrong by because terms cancel, in the order of `OUTPUTS`; 0 of out."""
    shape, d = Shape(*s.shape), _Draw.of(s, device, seed)
    captures = [c.double() if c.is_floating_point() else c for c in d.captures]
    q, k, v, do = (t.double() for t in (d.x.q, d.x.k, d.x.v, d.x.do))
    program = d.case.program
    env = reference._dense_environment(q, k, captures, s.params)
    p, _, lse = reference._dense_softmax(env, program)
    p = p.nan_to_num(0.0)
    rows = 1 / (1 - s.dropout) if s.dropout < 1 else 1.0
    values = reference._grouped(v, shape.heads, torch.float64)
    dp = rows * do.abs() @ values.abs().mT
    level = math.log(2) * lse.abs().nan_to_num(0.0, 0.0, 0.0).masked_fill(lse < DEEP, 0.0).unsqueeze(-1)  # (B, H, N, 1)
    out = rows * p @ values.abs() if s.dropout else (p @ values).abs()
    stored = torch.finfo(d.x.q.dtype).eps / 2 * (do.abs() * out).sum(-1, keepdim=True)  # (B, H, N, 1)
    env.grad = p * ((dp + (p * dp).sum(-1, keepdim=True)) * (TERMS + level) * EPS + stored)
    gradient = vjp(program, d.case.wrt)
    ds = reference.as_tensor(evaluate([gradient.dscore], env)[0], env).expand(p.shape).abs().nan_to_num(0.0, 0.0, 0.0)
    loads = {i: torch.zeros_like(captures[i]) for i in d.case.wrt}
    for load, g in gradient.loads:
        term = reference.as_tensor(evaluate([g], env)[0], env).abs().nan_to_num(0.0, 0.0, 0.0)
        scatter(load, term, loads[load.attr], env)  # pyright: ignore[reportArgumentType]
    dq, dk = ds @ reference._grouped(k, shape.heads, torch.float64).abs(), ds.mT @ q.abs()
    dv = rows * (p * level * EPS).mT @ do.abs()
    dk, dv = (t.unflatten(1, (shape.kv_heads, -1)).sum(2) for t in (dk, dv))
    return [0.0, *map(_largest, (dq, dk, dv, *loads.values()))]


def judge(s: Scored, device: str) -> list[str]:
    """What is wrong, a line each; empty if nothing is."""
    if device == "cpu":
        torch.set_num_threads(1)
    draws: list[list[tuple[float, float, float]]] = []
    terms: list[list[float]] = []
    wrong: list[str] = []
    for i in range(DRAWS):
        with few_scores(1):  # padding is skipped at any length
            draws.append(_results(s, device, s.seed + i))
        if i:  # only where one draw has said no
            terms = terms or [_uncancelled(s, device, s.seed)]
            terms.append(_uncancelled(s, device, s.seed + i))
        wrong = []
        for j, (what, errors) in enumerate(zip(OUTPUTS, zip(*draws, strict=True), strict=False)):
            ours, eager, size = max(e[0] for e in errors), max(e[1] for e in errors), min(e[2] for e in errors)
            limit = triton_cases.allowed(what, eager, getattr(torch, s.dtype))
            limit += max((t[j] for t in terms), default=0.0) / size
            if not ours <= limit:
                wrong.append(f"{what}: error {ours:.2e}, eager {eager:.2e}, allowed {limit:.2e}, {i + 1} draws")
        if not wrong:
            return []
    return wrong
