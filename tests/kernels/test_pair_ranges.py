"""Documents and ready-made masks: the tiles that tensors hide from some queries are skipped, and the result is eager's."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

FIXED = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
PAIRS = ("documents", "packed", "ready", "hidden", "of heads", "none", "every", "rows", "prefix")
ADDED = ("added", "added lowest", "added keys", "added between")


def run(what: str, paired: dict[str, Any], *rest: Any) -> Any:
    """Runs in the worker."""
    import pair_mask_cases
    import torch

    torch.set_num_threads(1)
    return getattr(pair_mask_cases, what)(pair_mask_cases.Paired(**paired), *rest)


def check(worker: ProcessPoolExecutor, what: str, *rest: Any, **paired: Any) -> None:
    wrong = worker.submit(run, what, paired, *rest).result()
    assert not wrong, f"{paired}: " + "; ".join(wrong)


# ---------------------------------------------------------------- the ranges


@st.composite
def asked(draw: st.DrawFn) -> dict[str, Any]:
    """Masks over pairs, with padding or not; at most one that is added."""
    pairs = draw(st.lists(st.sampled_from(PAIRS), max_size=2, unique=True))
    added = draw(st.lists(st.sampled_from(ADDED), min_size=0 if pairs else 1, max_size=1))
    padding = draw(st.sampled_from([[], [], ["padding"]]))
    return {
        "n": draw(st.sampled_from([1, 63, 129, 197])), "m": draw(st.sampled_from([1, 63, 129, 197])),
        "masks": (*pairs, *padding, *added), "structure": draw(st.sampled_from(["none", "causal", "window", "blocks"])),
        "form": draw(st.sampled_from(["where", "nested"])), "fill": draw(st.sampled_from(["-inf", "-1e9", "lowest"])),
        "batch": draw(st.integers(1, 2)), "heads": draw(st.integers(1, 2)), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@settings(max_examples=30, **FIXED)
@given(asked(), st.sampled_from([(16, 16), (32, 16), (16, 64), (64, 64)]))
def test_ranges(worker: ProcessPoolExecutor, paired: dict[str, Any], granularity: tuple[int, int]) -> None:
    found, expected = worker.submit(run, "ranges", paired, *granularity).result()
    assert found == expected


@pytest.mark.parametrize("masks", [("ready",), ("documents", "rows"), ("added between",)], ids="+".join)
def test_ranges_of_many_blocks_and_strips(worker: ProcessPoolExecutor, masks: tuple[str, ...]) -> None:
    """More keys than a program of the map looks at, and more tiles in a line than are looked at together."""
    paired = {"n": 300, "m": 1100, "masks": masks, "seed": 1, "batch": 1}
    found, expected = worker.submit(run, "ranges", paired, 16, 16, 16).result()
    assert found == expected


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("fill,form", [("-inf", "where"), ("-1e9", "nested"), ("lowest", "added")])
@pytest.mark.parametrize("masks", [("documents",), ("ready",), ("hidden", "padding"), ("rows", "documents")], ids="+".join)
def test_fills(worker: ProcessPoolExecutor, masks: tuple[str, ...], fill: str, form: str) -> None:
    """Rows without a key among them: with a finite fill these average over all keys."""
    check(worker, "compare", n=63, m=129, masks=masks, fill=fill, form=form)


@pytest.mark.parametrize("structure,fill", [("causal", "-inf"), ("window", "-1e9"), ("blocks", "lowest")])
def test_structures(worker: ProcessPoolExecutor, structure: str, fill: str) -> None:
    check(worker, "compare", n=129, m=129, masks=("documents", "padding"), structure=structure, fill=fill, seed=1)
    check(worker, "compare", n=63, m=63, masks=("ready",), structure=structure, fill=fill, form="nested", seed=2)


@pytest.mark.parametrize("masks", [("packed",), ("prefix",), ("of heads",), ("none",), ("every",)], ids="+".join)
def test_other_masks(worker: ProcessPoolExecutor, masks: tuple[str, ...]) -> None:
    check(worker, "compare", n=129, m=129, masks=masks, heads=2, kv_heads=1, fill="lowest", seed=3)


@pytest.mark.parametrize("masks", [(name,) for name in ADDED] + [("added lowest", "documents")], ids="+".join)
def test_masks_that_are_added(worker: ProcessPoolExecutor, masks: tuple[str, ...]) -> None:
    check(worker, "compare", n=129, m=197, masks=masks, heads=2, kv_heads=1, batch=1, seed=4)


@pytest.mark.parametrize("added", ["added far", "added low"])
def test_rows_far_from_plain_tiles(worker: ProcessPoolExecutor, added: str) -> None:
    """In half, whose eager takes such scores to fp32 beside a fill that is beyond half."""
    check(worker, "compare", n=129, m=197, masks=("every", added), fill="lowest", batch=1, dtype="float16")
    check(worker, "compare", n=129, m=197, masks=(added,), batch=1)


@pytest.mark.parametrize("masks", [("documents",), ("added lowest",), ("ready", "padding")], ids="+".join)
def test_what_else_a_program_has(worker: ProcessPoolExecutor, masks: tuple[str, ...]) -> None:
    """A learned bias that a mask does not take for one, sinks, weights, zeros of rows without a key, dropout, halves."""
    check(worker, "compare", n=65, m=129, masks=masks, bias=True, fill="-1e9", structure="causal", seed=5)
    check(worker, "compare", n=65, m=129, masks=masks, sink=True, heads=2, kv_heads=1, seed=6)
    check(worker, "compare", n=65, m=129, masks=masks, weight=True, dropout=0.25, heads=2, kv_heads=2, batch=1, seed=7)
    check(worker, "compare", n=65, m=129, masks=masks, zero_rows=True, seed=8)
    check(worker, "compare", n=65, m=129, masks=masks, dtype="float16", dropout=0.25, structure="causal", seed=9)


@st.composite
def programs(draw: st.DrawFn) -> dict[str, Any]:
    paired = draw(asked())
    heads = paired["heads"]
    return {
        **paired, "n": min(paired["n"], 129), "kv_heads": draw(st.sampled_from([1, heads])), "bias": draw(st.booleans()),
        "sink": draw(st.booleans()), "weight": draw(st.booleans()), "dropout": draw(st.sampled_from([0.0, 0.0, 0.25])),
        "dtype": draw(st.sampled_from(["float32", "float32", "float16"])),
    }  # fmt: skip


@settings(max_examples=10, **FIXED)
@given(programs())
def test_any(worker: ProcessPoolExecutor, options: dict[str, Any]) -> None:
    assume(options["dtype"] == "float32" or options["fill"] == "-inf")  # halves hold no fill that is a mask
    check(worker, "compare", **options)


# ---------------------------------------------------------------- that tiles really are skipped


@pytest.mark.parametrize("structure", ["none", "causal"])
def test_another_document_is_not_read(worker: ProcessPoolExecutor, structure: str) -> None:
    check(worker, "poisoned", n=256, m=256, masks=("documents",), structure=structure, batch=1)


def test_few_scores_are_not_asked_about(worker: ProcessPoolExecutor) -> None:
    paired = {"n": 256, "m": 256, "masks": ("documents",), "batch": 1}
    changed = worker.submit(run, "poisoned", paired, 1 << 60).result()
    assert changed == ["out changed", "dq changed", "dk changed", "dv changed"]
