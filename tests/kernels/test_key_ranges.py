"""Padding: the tiles that a tensor hides from every query are skipped, and what comes out is what eager gives."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

FIXED = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
KINDS = ("all", "none", "right", "left", "middle", "holes")


def run(what: str, padded: dict[str, Any], *rest: Any) -> Any:
    """Runs in the worker."""
    import key_mask_cases
    import torch

    torch.set_num_threads(1)
    return getattr(key_mask_cases, what)(key_mask_cases.Padded(**padded), *rest)


def check(worker: ProcessPoolExecutor, what: str, **padded: Any) -> None:
    wrong = worker.submit(run, what, padded).result()
    assert not wrong, f"{padded}: " + "; ".join(wrong)


# ---------------------------------------------------------------- the ranges


@settings(max_examples=60, **FIXED)
@given(
    st.sampled_from([1, 16, 63, 129, 197]),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    st.sampled_from(["b", "h", "bh", "ints", "length"]),
    st.integers(1, 3),
    st.sampled_from([16, 64, 256]),
    st.integers(0, 99),
)
def test_ranges(worker: ProcessPoolExecutor, m: int, kinds: list[str], by: str, heads: int, block: int, seed: int) -> None:
    assume(by != "length" or not {"left", "middle", "holes"} & set(kinds))
    padded = {"n": 3, "m": m, "kinds": tuple(kinds), "by": by, "heads": heads, "seed": seed}
    found, expected = worker.submit(run, "ranges", padded, block).result()
    assert found == expected


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("fill", ["-inf", "-1e9", "lowest"])
@pytest.mark.parametrize("kinds", [("right", "left"), ("holes", "middle"), ("none", "right"), ("all", "none")], ids="-".join)
def test_fills(worker: ProcessPoolExecutor, kinds: tuple[str, str], fill: str) -> None:
    check(worker, "compare", n=63, m=197, kinds=kinds, fill=fill)


@pytest.mark.parametrize("structure", ["causal", "window", "blocks"])
@pytest.mark.parametrize("fill,form", [("-inf", "where"), ("-1e9", "nested"), ("lowest", "added")])
def test_structures(worker: ProcessPoolExecutor, structure: str, fill: str, form: str) -> None:
    check(worker, "compare", n=129, m=129, kinds=("right", "left"), structure=structure, fill=fill, form=form, seed=1)


@pytest.mark.parametrize("bias,fill", [("keys", "-inf"), ("table", "-1e9"), ("own", "lowest")])
def test_gradients_of_captures(worker: ProcessPoolExecutor, bias: str, fill: str) -> None:
    check(worker, "compare", n=33, m=129, kinds=("right", "middle"), structure="causal", bias=bias, fill=fill, seed=2)


@pytest.mark.parametrize("by", ["h", "bh", "length", "ints"])
def test_what_the_mask_is_read_at(worker: ProcessPoolExecutor, by: str) -> None:
    check(worker, "compare", n=17, m=129, kinds=("right", "all", "right"), by=by, heads=2)


@pytest.mark.parametrize("structure", ["none", "causal"])
def test_zero_rows(worker: ProcessPoolExecutor, structure: str) -> None:
    check(worker, "compare", n=33, m=129, kinds=("none", "left"), structure=structure, bias="keys", zero_rows=True)


def test_dropout_and_half(worker: ProcessPoolExecutor) -> None:
    check(worker, "compare", n=63, m=197, kinds=("right", "left"), dropout=0.25)
    check(worker, "compare", n=63, m=197, kinds=("right", "left"), dtype="float16", structure="causal")


@st.composite
def padded(draw: st.DrawFn) -> dict[str, Any]:
    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    form = one("where", "nested", "added")
    return {
        "n": one(1, 17, 63, 129), "m": one(1, 63, 129, 197), "kinds": (one(*KINDS), one(*KINDS)), "form": form,
        "fill": "lowest" if form == "added" else one("-inf", "-1e9", "lowest"), "by": one("b", "h", "bh", "ints"),
        "structure": one("none", "causal", "window", "blocks"), "bias": one("", "", "keys", "table", "own"),
        "dropout": one(0.0, 0.0, 0.25), "heads": 2, "kv_heads": one(1, 2), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@settings(max_examples=8, **FIXED)
@given(padded())
def test_any(worker: ProcessPoolExecutor, options: dict[str, Any]) -> None:
    check(worker, "compare", **options)


# ---------------------------------------------------------------- that tiles really are skipped


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ("right", "left"), "n": 17},
        {"kinds": ("left", "right"), "n": 63, "fill": "lowest", "form": "added"},  # dx reaches dk, whatever the mask says
        {"kinds": ("middle", "right"), "n": 17, "fill": "-1e9", "bias": "table"},
        {"kinds": ("right", "right"), "n": 197, "fill": "lowest", "structure": "causal"},
    ],
    ids=str,
)
def test_a_hidden_tile_is_not_read(worker: ProcessPoolExecutor, options: dict[str, Any]) -> None:
    check(worker, "poisoned", m=197, seed=3, **options)


def test_short_sequences_do_not_ask(worker: ProcessPoolExecutor) -> None:
    check(worker, "does_not_ask", n=5, m=63, kinds=("right",))
