"""One written score program through the Triton kernels, beside a dense reference in float64 and in its own dtype.

Imported where Triton runs: in the worker process that interprets it, and on a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from fusion_kernels.program import parse

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import triton_cases
from triton_cases import OUTPUTS, Case, Operands, Shape

from fuzz.inputs import make
from fuzz.scores import Scored

__all__ = ["judge"]

SEED = 987654321987  # of dropout: more than 32 bits
DRAWS = 4


def _results(s: Scored, device: str, seed: int) -> list[tuple[float, float]]:
    """(error of the kernels, error of eager) of each output, as `triton_cases.compare` measures them."""
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
    return [(triton_cases.distance(o, e), triton_cases.distance(r, e)) for o, r, e in zip(ours, eager, exact, strict=True)]


def judge(s: Scored, device: str) -> list[str]:
    """What is wrong, a line each; empty if nothing is.

    Eager's own error is that of the program, not of one draw of its tensors: before a result is called wrong, the largest
    errors over several draws are compared.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    draws: list[list[tuple[float, float]]] = []
    wrong: list[str] = []
    for i in range(DRAWS):
        draws.append(_results(s, device, s.seed + i))
        wrong = []
        for what, errors in zip(OUTPUTS, zip(*draws, strict=True), strict=False):
            ours, eager = max(o for o, _ in errors), max(e for _, e in errors)
            limit = triton_cases.allowed(what, eager, getattr(torch, s.dtype))
            if not ours <= limit:
                wrong.append(f"{what}: error {ours:.2e}, eager {eager:.2e}, allowed {limit:.2e}, {i + 1} draws")
        if not wrong:
            return []
    return wrong
