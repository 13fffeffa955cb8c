"""One written program, run eagerly, exactly and fused, and judged: the verdict, then the numbers.

Dropout drops other elements than eager's generator would, so the references of a program with dropout use the op's own bits:
a program draws one seed, and the bits of element (q, k) of row-major lead index r are those of (seed, r, q, k).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from checks import (
    Recorder,
    Result,
    allowed,
    assert_rule,
    compile_always,
    error,
    exactly,
    fused_nodes,
    misplaced,
    overflow,
    run,
    sites_text,
)
from fusion_kernels.philox import keep_mask
from torch import Tensor

import fusion_pass
from fusion_pass.rewrite import SEEDS
from fuzz.inputs import make
from fuzz.programs import Written

__all__ = ["check"]

DRAWS = 8  # of the inputs, where one draw is not enough to tell a wrong result from a lucky eager
ROUNDINGS = 8  # of terms that cancel: four each of p dp and of the sum


def op_dropout(p: Tensor, rate: float = 0.5, training: bool = True) -> Tensor:
    """`F.dropout` with the bits of the fused op, from a seed drawn as its graph draws it."""
    if not training:
        return p
    seed = torch.randint(0, SEEDS, ())
    lead, (n, m) = p.shape[:-2], p.shape[-2:]
    rows = torch.arange(math.prod(lead)).view(-1, 1)
    kept = keep_mask(seed, rate, rows, (0, n), (0, m)).reshape(*lead, n, m)
    return p * kept.to(p.dtype) / (1 - rate)


Runs = tuple[Result, Result, Result, bool]  # fused, eager, exact; whether float16 arithmetic overflows in eager


def _pooled(runs: list[Runs], terms: list[Result]) -> None:
    """The rule for the largest errors over several draws: eager's own error belongs to the program, not to one draw of it.

    A score's gradient is p (dp - sum_k p dp), and where the difference cancels (one key: exactly) eager may be right by chance
    to the last bit, for it forms both terms alike; a fused backward gets the sum as do . o.  So the epsilon of a gradient is
    taken at the size of its terms as well: `ROUNDINGS`, in the dtype of the accumulation, of the largest that `terms` has.
    """
    for i, (name, _) in enumerate(runs[0][0].named()):
        values = [[r.named()[i][1] for r in results] for *results, _ in runs]
        if values[0][0] is None or not values[0][0].is_floating_point():
            continue
        for (x, e, t), (*_, overflows) in zip(values, runs, strict=True):
            assert not (wrong := misplaced(name, x, e, t, overflows)), f"fuzz: {name}: {wrong}"
        got = max(error(x, t) for x, _, t in values)
        eager = max(error(e, t) for _, e, t in values)
        limit = max(allowed(e, t) for _, e, t in values)
        if name.startswith("gradient"):
            largest = [t.named()[i][1].nan_to_num(0.0, 0.0, 0.0).abs().max().item() for t in terms]
            limit += ROUNDINGS * torch.finfo(torch.promote_types(values[0][1].dtype, torch.float32)).eps * max(largest)
        assert got <= limit, f"fuzz: {name}: error {got:.3g} over {len(runs)} draws, eager's is {eager:.3g}, allowed {limit:.3g}"


def _verdict(w: Written, recorder: Recorder) -> None:
    report = fusion_pass.last_report()
    found = fused_nodes(recorder.graphs[-1:])  # one graph, which Dynamo hands over twice where it begins anew
    assert len(report.fused) == found, f"{found} fused ops in the graphs{sites_text(report)}"
    assert not any(s.verdict.reason is not None and s.verdict.reason.name == "INTERNAL" for s in report.sites), sites_text(report)
    if w.fused is not None:
        fused, refused = len(report.fused), len(report.refused)
        right = (fused, refused) == (w.sites, 0) if w.fused else fused == 0 < refused <= w.sites
        assert right, f"{w.sites} sites, {'fused' if w.fused else 'refused'}, wanted{sites_text(report)}"


def check(w: Written) -> None:
    """Raise AssertionError where the fused program is not eager's equal, or the verdict is another one than it must be.

    A program with inputs of a second length is run on them by what the first ones have compiled.
    """
    torch.manual_seed(w.seed)
    recorder = Recorder(w.inner)
    compiled = compile_always(w.build(), recorder, dynamic=w.dynamic)
    _check(w, compiled, recorder)
    if w.second:
        at_first = len(recorder.graphs)
        _check(replace(w, inputs=w.second), compiled, recorder)
        if len(recorder.graphs) > at_first:
            _check_compiles(w, len(recorder.graphs))


def _check_compiles(w: Written, count: int) -> None:
    """Another length may compile anew only where it does without the pass: sizes that were equal have one symbol."""
    torch._dynamo.reset()
    recorder = Recorder("eager")
    plain = torch.compile(w.build(), backend=recorder, fullgraph=True, dynamic=True)
    for inputs in (w.inputs, w.second):
        plain(*make(inputs, w.dtype, w.seed))
    assert count <= len(recorder.graphs), f"compiled {count} times for two lengths, {len(recorder.graphs)} without the pass"


def _check(w: Written, compiled: Callable[..., Any], recorder: Recorder) -> None:
    def call(how: Callable[..., Result], fn: Callable[..., Any], seed: int) -> Result:
        torch.manual_seed(w.seed)  # of dropout
        return how(fn, w.make(seed))

    first = call(run, compiled, w.seed)
    _verdict(w, recorder)  # before more draws, which may compile anew
    names: dict[str, Any] = {}
    if w.dropout and fusion_pass.last_report().fused:  # a program that was left alone drops what eager drops
        names["F"] = SimpleNamespace(**{**vars(F), "dropout": op_dropout})
    reference = w.build(**names)

    def runs(seed: int, fused: Result | None = None) -> Runs:
        fused = call(run, compiled, seed) if fused is None else fused
        overflows = w.dtype == torch.float16 and overflow(reference, w.make(seed))
        return fused, call(run, reference, seed), call(exactly, reference, seed), overflows

    fused, eager, exact, overflows = one = runs(w.seed, first)
    try:
        assert_rule(fused, eager, exact, "fuzz", overflows=overflows)
    except AssertionError as failed:
        if ": error " not in str(failed):  # NaN and inf, shapes and dtypes are not a matter of luck
            raise
        seeds = [w.seed + 1 + i for i in range(DRAWS)]
        uncancelled = w.uncancelled.build(**names)
        _pooled([one, *map(runs, seeds)], [call(exactly, uncancelled, x) for x in (w.seed, *seeds)])
