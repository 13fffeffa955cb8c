"""Documents and ready-made masks on a GPU: what is skipped, and in the dtypes that only a GPU has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import pair_mask_cases
from pair_mask_cases import Paired

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def jobs() -> list[Paired]:
    out: list[Paired] = []
    for masks in (("documents",), ("ready",), ("rows", "documents"), ("hidden", "padding")):
        for dtype in ("bfloat16", "float16", "float32"):
            out += [Paired(197, 1025, masks, fill=fill, dtype=dtype, heads=2, d=64) for fill in ("-inf", "-1e9", "lowest")]
    for structure in ("causal", "window", "blocks"):
        for fill in ("-inf", "lowest"):
            masks = ("documents",)
            out.append(Paired(1100, 1100, masks, structure=structure, fill=fill, dtype="bfloat16", heads=2, d=128, seed=1))
    for masks in (("packed",), ("prefix",), ("of heads",), ("none",), ("every",)):
        out.append(Paired(600, 600, masks, dtype="bfloat16", heads=4, kv_heads=2, d=64, fill="lowest", seed=2))
    for masks in (("added",), ("added lowest",), ("added keys",), ("added between",), ("added lowest", "documents")):
        out += [Paired(600, 1040, masks, dtype=dtype, heads=2, d=128, seed=3) for dtype in ("bfloat16", "float32")]
    for masks in (("documents",), ("added lowest",), ("ready", "padding")):
        out.append(Paired(300, 1040, masks, bias=True, structure="causal", fill="-1e9", dtype="bfloat16", d=64, seed=4))
        out.append(Paired(300, 1040, masks, sink=True, dtype="bfloat16", heads=2, d=64, seed=5))
        out.append(Paired(300, 1040, masks, weight=True, dropout=0.25, dtype="bfloat16", heads=2, kv_heads=2, d=64, seed=6))
        out.append(Paired(300, 1040, masks, zero_rows=True, dtype="bfloat16", d=80, seed=7))
        out.append(Paired(300, 1040, masks, dtype="bfloat16", d=256, seed=8))
    out.append(Paired(63, 20000, ("ready",), dtype="bfloat16", d=64, seed=9))
    return out


@pytest.mark.parametrize("paired", jobs(), ids=str)
def test_case(paired: Paired) -> None:
    wrong = pair_mask_cases.compare(paired, "cuda")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("masks", [("documents", "rows"), ("ready",), ("added between",)], ids="+".join)
@pytest.mark.parametrize("granularity", [(16, 16), (128, 64), (64, 128)], ids=str)
def test_ranges(masks: tuple[str, ...], granularity: tuple[int, int]) -> None:
    """More keys than a program of the map looks at, and more tiles in a line than are looked at together."""
    paired = Paired(500, 17000, masks, structure="window", heads=2, seed=1)
    found, expected = pair_mask_cases.ranges(paired, *granularity, device="cuda")
    assert found == expected


@pytest.mark.parametrize("structure", ["none", "causal"])
@pytest.mark.parametrize("d", [64, 128])
def test_another_document_is_not_read(d: int, structure: str) -> None:
    paired = Paired(2048, 2048, ("documents",), structure=structure, dtype="bfloat16", heads=2, kv_heads=1, d=d)
    wrong = pair_mask_cases.poisoned(paired, device="cuda")
    assert not wrong, "; ".join(wrong)
