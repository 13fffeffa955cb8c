"""Every spelling in the table: fused, right, and nothing of size N x N left; its twin refused or different.

Rows run on the CPU, or where FUSION_PASS_TEST_DEVICE says; with "cuda", what is marked `on_a_gpu` is part of `make test-gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import (
    Recorder,
    Result,
    Watch,
    assert_fused,
    assert_rule,
    assert_same,
    compile_always,
    differs,
    exactly,
    run,
    sites_text,
)
from spellings import SPELLINGS, Spelling, make_inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusion_pass
from fusion_pass.site import Site

DEVICE = torch.device(os.environ.get("FUSION_PASS_TEST_DEVICE", "cpu"))
# The op takes float64 on a CPU alone: elsewhere such a row is refused, by design.
ROWS = [row for row in SPELLINGS.values() if DEVICE.type == "cpu" or torch.float64 not in row.dtypes]
on_a_gpu = pytest.mark.gpu if DEVICE.type == "cuda" else lambda test: test


def made(row: Spelling, *, twin: bool = False, seed: int = 0) -> tuple[Callable[..., Any], list[Any]]:
    """The row's function or module and its inputs, on `DEVICE`."""
    return row.build(twin, DEVICE), make_inputs(row, seed, DEVICE)


def _judge(row: Spelling, fused: Result, eager: Result, exact: Callable[[], Result]) -> None:
    if row.against == "eager":
        return assert_same(fused, eager, row.name)
    assert_rule(fused, eager, exact(), row.name)


def _scores_shape(site: Site) -> tuple[int, int, int]:
    """(batch * heads, queries, keys) of a fused site."""
    assert site.attention is not None
    b, h, n, _ = site.attention.q.shape
    return b * h, n, site.attention.k.shape[2]


def _check_mask(row: Spelling) -> None:
    if row.mask is None:
        return
    for site in fusion_pass.last_report().fused:
        assert site.attention is not None
        facts = site.attention.mask
        assert facts.skips and row.mask in facts.text, f"mask fact {facts.text!r} (skips: {facts.skips}), {row.mask!r} wanted"


@on_a_gpu
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_fused_and_right(row: Spelling) -> None:
    fn, inputs = made(row)
    eager = run(fn, inputs)
    recorder = Recorder("eager")
    compiled = compile_always(fn, recorder, dynamic=False)
    fused = run(compiled, inputs)
    assert_fused(fusion_pass.last_report(), recorder, row.sites)
    _check_mask(row)
    _judge(row, fused, eager, lambda: exactly(fn, inputs))

    rows, n, m = max(_scores_shape(site) for site in fusion_pass.last_report().fused)
    if min(n, m) == 1 or rows * n * m <= max(x.numel() for x in inputs if isinstance(x, Tensor)):
        return  # an input is as large as the scores: nothing can be told from sizes
    recorder.watch = watch = Watch((n, m), rows * n * m)
    run(compiled, inputs, watch=watch)
    assert not watch.seen, f"tensors as large as the scores: {watch.seen}"


@pytest.mark.parametrize("row", [r for r in ROWS if r.dynamic], ids=str)
def test_dynamic_shapes(row: Spelling) -> None:
    fn, inputs = made(row, seed=1)
    eager = run(fn, inputs)
    recorder = Recorder("eager")
    fused = run(compile_always(fn, recorder, dynamic=True), inputs)
    assert_fused(fusion_pass.last_report(), recorder, row.sites)
    _judge(row, fused, eager, lambda: exactly(fn, inputs))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_twin(row: Spelling) -> None:
    """The sibling with one edit is refused for the reason in the table, or gives another result: so the tests above can fail."""
    twin, inputs = made(row, twin=True)
    if row.refused is None:
        spelled, _ = made(row)
        a = run(spelled, inputs)
        b = run(twin, inputs)
        if row.against == "eager":
            with pytest.raises(AssertionError):
                assert_same(b, a, row.name)
            return
        assert differs(a, b, exactly(spelled, inputs)), "the twin gives the same result"
        return
    recorder = Recorder("eager")
    fused = run(compile_always(twin, recorder, dynamic=False), inputs)
    report = fusion_pass.last_report()
    assert not report.fused, f"the twin was fused{sites_text(report)}"
    assert [site.verdict.reason for site in report.refused] == [row.refused], sites_text(report)
    assert_rule(fused, run(twin, inputs), exactly(twin, inputs), row.name)


def test_the_check_fails_where_nothing_is_matched() -> None:
    """The assertion on the count of fused sites is not vacuous: the same body fails on a graph that the pass has not seen."""
    row = SPELLINGS["at_operator"]
    recorder = Recorder("eager")
    fn, inputs = made(row)
    torch.compile(fn, backend=recorder, fullgraph=True)(*inputs)
    with pytest.raises(AssertionError, match="0 fused ops in the graphs, 1 wanted"):
        report = _report_of(row)
        assert_fused(report, recorder, 1)


def _report_of(row: Spelling) -> Any:
    fn, inputs = made(row)
    compile_always(fn, Recorder("eager"))(*inputs)
    return fusion_pass.last_report()


INDUCTOR = ["bnhd_transpose", "repeat_kv_expand", "causal_and_padding", "RotaryBlock", "bias_hnm", "scale_from_shape"]


@on_a_gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # Inductor's advice on a GPU; exact products are wanted here
@pytest.mark.parametrize("name", INDUCTOR)
def test_through_inductor(name: str) -> None:
    row = SPELLINGS[name]
    fn, inputs = made(row)
    eager = run(fn, inputs)
    compiled = torch.compile(fn, backend=fusion_pass.make_backend(when="always"), fullgraph=True)
    fused = run(compiled, inputs)
    report = fusion_pass.last_report()
    assert len(report.fused) == row.sites, sites_text(report)
    _judge(row, fused, eager, lambda: exactly(fn, inputs))


@pytest.mark.parametrize("name", ["bnhd_transpose", "CausalBufferNanoGPT", "relative_positions"])
def test_one_graph_for_many_lengths(name: str) -> None:
    """Under dynamic shapes a second length reuses the compiled graph and is as right as the first."""
    row = SPELLINGS[name]
    fn, inputs = made(row)
    recorder = Recorder("eager")
    compiled = compile_always(fn, recorder, dynamic=True)
    for cut in (0, 17, 40):
        shorter = [_shorter(x, cut) for x in inputs]
        eager, exact = run(fn, shorter), exactly(fn, shorter)
        assert_rule(run(compiled, shorter), eager, exact, f"{name}, {cut} shorter")
    assert len(recorder.graphs) == 1, "recompiled for another length"


def _shorter(x: Tensor, cut: int) -> Tensor:
    """`x` without the last `cut` positions (the dim before the last, or dim 1 of a (B, N, E) input)."""
    if x.dim() < 3:
        return x
    dim = x.dim() - 2
    return x.detach().narrow(dim, 0, x.shape[dim] - cut).requires_grad_(x.requires_grad)


class Elsewhere(TorchDispatchMode):
    """Notes every op that makes a tensor on another device than `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [str(func) for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type != self.device]
        return out


@pytest.mark.parametrize("twin", [False, True], ids=["spelled", "twin"])
def test_rows_keep_to_the_device_of_their_inputs(twin: bool) -> None:
    """Every row can run on a GPU as it stands: on the meta device, which any machine has, it makes no tensor elsewhere."""
    for row in SPELLINGS.values():
        fn, inputs = row.build(twin), [x.detach().to("meta") if isinstance(x, Tensor) else x for x in make_inputs(row)]
        if isinstance(fn, nn.Module):
            fn = fn.to("meta")
        with torch.no_grad(), Elsewhere("meta") as elsewhere:
            fn(*inputs)
        assert not elsewhere.seen, f"{row.name}: {elsewhere.seen}"


def test_sizes_in_the_table_are_odd() -> None:
    """The table keeps to lengths that no tile size divides: 1, 63, 129, 197 all occur."""
    lengths = {n for row in ROWS for x in row.inputs if hasattr(x, "shape") for n in x.shape}
    assert {1, 63, 129, 197} <= lengths
