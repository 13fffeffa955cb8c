"""One written program, run eagerly, exactly and fused, and judged: the verdict, then the numbers.

Dropout drops other elements than eager's generator would, so the references of a program with dropout use the op's own bits:
a program draws one seed, and the bits of element (q, k) of row-major lead index r are those of (seed, r, q, k).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    largest,
    misplaced,
    overflow,
    rounding_errors,
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

DRAWS = (9, 99)  # of the inputs, where fewer are not enough to tell a wrong result from a lucky eager
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


@dataclass
class _Runs:
    """One draw of the inputs, run three times. own: what eager is wrong by, an entry for each of `Result.named`.

    overflows: whether float16 arithmetic overflows in eager.
    """

    fused: Result
    eager: Result
    exact: Result
    own: list[float]
    overflows: bool

    def named(self) -> Iterator[tuple[str, Any, Any, Any, float]]:
        triples = zip(self.fused.named(), self.eager.named(), self.exact.named(), self.own, strict=True)
        return ((name, x, e, t, own) for (name, x), (_, e), (_, t), own in triples)


def _pooled(runs: list[_Runs], terms: list[Result], low: torch.dtype | None) -> None:
    """The rule for the largest errors over several draws: eager's own error belongs to the program, not to one draw of it.

    A score's gradient is p (dp - sum_k p dp), and where the difference cancels (one key: exactly) eager may be right by chance
    to the last bit, for it forms both terms alike; a fused backward gets the sum as do . o.  So the epsilon of a gradient is
    taken at the size of its terms as well: `ROUNDINGS`, in the dtype of the accumulation, of the largest that `terms` has.

    low: what autocast makes the operands of products. A result is rounded to it once, which its own dtype does not show: a
    gradient that several heads share is such a result here, and in eager a sum of the heads' in fp32.
    """
    for i, values in enumerate(zip(*(r.named() for r in runs), strict=True)):
        name, _, e, *_ = values[0]
        if e is None or not e.is_floating_point():
            continue
        for (_, x, e, t, _), r in zip(values, runs, strict=True):
            assert not (wrong := misplaced(name, x, e, t, r.overflows)), f"fuzz: {name}: {wrong}"
        got = max(error(x, t, e) for _, x, e, t, _ in values)
        eager = max(own for *_, own in values)
        limit = max(allowed(e, t, own=eager) for _, _, e, t, _ in values)
        if low is not None:
            limit += torch.finfo(low).eps / 2 * max(largest(t) for _, _, _, t, _ in values)
        if name.startswith("gradient"):
            terms_largest = [t.named()[i][1].nan_to_num(0.0, 0.0, 0.0).abs().max().item() for t in terms]
            limit += ROUNDINGS * torch.finfo(torch.promote_types(e.dtype, torch.float32)).eps * max(terms_largest)
        assert got <= limit, f"fuzz: {name}: error {got:.3g} over {len(runs)} draws, eager's is {eager:.3g}, allowed {limit:.3g}"


def _verdict(w: Written, recorder: Recorder) -> None:
    report = fusion_pass.last_report()
    found = fused_nodes(recorder.graphs[-1:])  # one graph, which Dynamo hands over twice where it begins anew
    left = w.source.count("F.scaled_dot_product_attention(")  # torch's own, which may stay
    assert 0 <= found - len(report.fused) <= left, f"{found} fused ops in the graphs{sites_text(report)}"
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

    def runs(seed: int, fused: Result | None = None) -> _Runs:
        fused = call(run, compiled, seed) if fused is None else fused
        eager, exact = call(run, reference, seed), call(exactly, reference, seed)
        overflows = w.dtype == torch.float16 and overflow(reference, w.make(seed))
        if w.dtype == torch.float64:
            torch.manual_seed(w.seed)
            return _Runs(fused, eager, exact, rounding_errors(reference, w.make(seed)), overflows)
        pairs = zip(eager.named(), exact.named(), strict=True)
        own = [error(e, t) if e is not None and e.is_floating_point() else 0.0 for (_, e), (_, t) in pairs]
        return _Runs(fused, eager, exact, own, overflows)

    one = runs(w.seed, first)
    try:
        assert_rule(one.fused, one.eager, one.exact, "fuzz", overflows=one.overflows)
    except AssertionError as failed:
        if ": error " not in str(failed):  # NaN and inf, shapes and dtypes are not a matter of luck
            raise
        uncancelled = w.uncancelled.build(**names)
        low = torch.bfloat16 if "torch.autocast(" in w.source else None
        drawn, terms = [one], [call(exactly, uncancelled, w.seed)]
        for draws in DRAWS:
            seeds = range(w.seed + len(drawn), w.seed + draws)
            drawn += map(runs, seeds)
            terms += [call(exactly, uncancelled, x) for x in seeds]
            try:
                return _pooled(drawn, terms, low)
            except AssertionError:
                if draws == DRAWS[-1]:
                    raise
