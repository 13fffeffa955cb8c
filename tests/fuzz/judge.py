"""One written program, run eagerly, exactly and fused, and judged: the verdict, then the numbers.

Dropout drops other elements than eager's generator would, so the references of a program with dropout use the op's own bits:
a program draws one seed, and the bits of element (q, k) of row-major lead index r are those of (seed, r, q, k).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from checks import Recorder, Result, allowed, assert_rule, compile_always, error, exactly, fused_nodes, run, sites_text
from fusion_kernels.philox import keep_mask
from torch import Tensor

import fusion_pass
from fusion_pass.rewrite import SEEDS
from fuzz.programs import Written

__all__ = ["check"]

DRAWS = 8  # of the inputs, where one draw is not enough to tell a wrong result from a lucky eager


def op_dropout(p: Tensor, rate: float = 0.5, training: bool = True) -> Tensor:
    """`F.dropout` with the bits of the fused op, from a seed drawn as its graph draws it."""
    if not training:
        return p
    seed = torch.randint(0, SEEDS, ())
    lead, (n, m) = p.shape[:-2], p.shape[-2:]
    rows = torch.arange(math.prod(lead)).view(-1, 1)
    kept = keep_mask(seed, rate, rows, (0, n), (0, m)).reshape(*lead, n, m)
    return p * kept.to(p.dtype) / (1 - rate)


def _pooled(results: list[tuple[Result, Result, Result]], what: str) -> None:
    """The rule for the largest errors over several draws: eager's own error belongs to the program, not to one draw of it."""
    for column in zip(*(zip(*(r.named() for r in triple), strict=True) for triple in results), strict=True):
        name = column[0][0][0]
        values = [(x, e, t) for (_, x), (_, e), (_, t) in column if x is not None and x.is_floating_point()]
        if not values:
            continue
        got = max(error(x, t) for x, _, t in values)
        limit = max(allowed(e, t) for _, e, t in values)
        eager = max(error(e, t) for _, e, t in values)
        assert got <= limit, f"{what}: {name}: error {got:.3g} over {len(values)} draws, eager's is {eager:.3g}, allowed {limit:.3g}"


def _verdict(w: Written, recorder: Recorder) -> None:
    report = fusion_pass.last_report()
    found = fused_nodes(recorder.graphs)
    assert len(report.fused) == found, f"{found} fused ops in the graphs{sites_text(report)}"
    assert not any(s.verdict.reason is not None and s.verdict.reason.name == "INTERNAL" for s in report.sites), sites_text(report)
    if w.fused is not None:
        assert (len(report.fused), len(report.refused)) == ((1, 0) if w.fused else (0, 1)), (
            f"{'one fused site' if w.fused else 'one refused site'} wanted{sites_text(report)}"
        )


def check(w: Written) -> None:
    """Raise AssertionError where the fused program is not eager's equal, or the verdict is another one than it must be."""
    shim: Any = SimpleNamespace(**{**vars(F), "dropout": op_dropout})
    reference = w.build(F=shim) if w.dropout else w.build()
    recorder = Recorder(w.inner)
    compiled = compile_always(w.build(), recorder, dynamic=w.dynamic)

    def three(seed: int) -> tuple[Result, Result, Result]:
        inputs, results = w.make(seed), []
        for call, fn in ((run, compiled), (run, reference), (exactly, reference)):
            torch.manual_seed(w.seed)
            results.append(call(fn, inputs))
        return tuple(results)

    first = three(w.seed)
    try:
        assert_rule(*first, "fuzz")
    except AssertionError as failed:
        if ": error " not in str(failed):  # NaN, inf, shapes and dtypes hold in every draw
            _verdict(w, recorder)
            raise
        _pooled([first, *(three(w.seed + 1 + i) for i in range(DRAWS))], "fuzz")
    _verdict(w, recorder)
