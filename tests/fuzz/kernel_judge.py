"""One written score program through the Triton kernels, beside a dense reference in float64 and in its own dtype.

Imported where Triton runs: in the worker process that interprets it, and on a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fusion_kernels import reference
from fusion_kernels.derivative import vjp
from fusion_kernels.evaluate import evaluate
from fusion_kernels.program import parse

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import triton_cases
from triton_cases import OUTPUTS, Case, Operands, Shape

from fuzz.inputs import make
from fuzz.scores import Scored

__all__ = ["judge"]

SEED = 987654321987  # of dropout: more than 32 bits
DRAWS = 4


def _results(s: Scored, device: str, seed: int) -> list[tuple[float, float, float]]:
    """(error of the kernels, error of eager, the size both are measured by) of each output, as `triton_cases.compare` does."""
    shape, dtype = Shape(*s.shape), getattr(torch, s.dtype)
    torch.manual_seed(seed)
    x: Operands = triton_cases.operands(shape, dtype, device, s.transposed)
    if s.poison is not None:
        x.q[-1, -1, shape.n // 2, 0] = s.poison
    captures = [c.to(device) for c in make(s.captures, dtype, seed)]
    case = Case(parse(s.text), captures, s.params)
    keep = triton_cases.keep_mask(SEED, shape, s.dropout).to(device) if s.dropout else None
    exact = triton_cases.dense(x, case, captures, torch.float64, s.dropout, keep)
    eager = triton_cases.dense(x, case, captures, dtype, s.dropout, keep)
    ours = triton_cases.fused(x, case, captures, s.dropout, torch.tensor(SEED, device=device) if s.dropout else None)
    sizes = [e.nan_to_num(0.0, 0.0, 0.0).abs().max().item() for e in exact]
    both = [(triton_cases.distance(o, e), triton_cases.distance(r, e)) for o, r, e in zip(ours, eager, exact, strict=True)]
    return [(*pair, size if size > 1e-3 else 30.0) for pair, size in zip(both, sizes, strict=True)]


def _cancelling(s: Scored, device: str, seed: int) -> dict[str, float]:
    """Sixteen fp32 roundings of the terms of dq and dk, over the size that errors are measured by.

    A row of ds is p (dp - sum p dp) f'(s). Eager forms both terms from the same rounded dp, so what they share cancels to the
    last bit; a fused backward has the sum as do . out, which is rounded on its own, as in FlashAttention-2 (arXiv 2307.08691).
    """
    shape, dtype = Shape(*s.shape), getattr(torch, s.dtype)
    if s.poison is not None:
        return {}
    torch.manual_seed(seed)
    x = triton_cases.operands(shape, dtype, device, s.transposed)
    captures = [c.to(device).double() if c.is_floating_point() else c.to(device) for c in make(s.captures, dtype, seed)]
    program = parse(s.text)
    q, k, v, do = (t.double() for t in (x.q, x.k, x.v, x.do))
    env = reference._dense_environment(q, k, captures, s.params)
    p, _ = reference._dense_softmax(env, program)
    size = do.abs() @ reference._grouped(v, shape.heads, torch.float64).abs().mT / (1 - s.dropout if s.dropout < 1 else 1)
    env.grad = p * (size + (p * size).sum(-1, keepdim=True))
    ds = reference.as_tensor(evaluate([vjp(program).dscore], env)[0], env).expand(p.shape).abs()
    largest = {"dq": ds @ reference._grouped(k, shape.heads, torch.float64).abs(), "dk": ds.mT @ q.abs()}
    eps = 16 * torch.finfo(torch.float32).eps
    return {what: eps * t.nan_to_num(0.0, 0.0, 0.0).max().item() for what, t in largest.items()}


def judge(s: Scored, device: str) -> list[str]:
    """What is wrong, a line each; empty if nothing is.

    Eager's own error is that of the program, not of one draw of its tensors: before a result is called wrong, the largest
    errors over several draws are compared.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    draws: list[list[tuple[float, float, float]]] = []
    wrong: list[str] = []
    for i in range(DRAWS):
        draws.append(_results(s, device, s.seed + i))
        wrong = []
        terms = _cancelling(s, device, s.seed + i) if i else {}  # only where one draw has said no
        for what, errors in zip(OUTPUTS, zip(*draws, strict=True), strict=False):
            ours, eager, size = max(e[0] for e in errors), max(e[1] for e in errors), min(e[2] for e in errors)
            limit = triton_cases.allowed(what, eager, getattr(torch, s.dtype))
            limit += terms.get(what, 0.0) / size
            if not ours <= limit:
                wrong.append(f"{what}: error {ours:.2e}, eager {eager:.2e}, allowed {limit:.2e}, {i + 1} draws")
        if not wrong:
            return []
    return wrong
