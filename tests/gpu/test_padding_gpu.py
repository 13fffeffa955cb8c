"""Padding on a GPU: what is skipped, at the lengths where the kernels ask for it, and in the dtypes that only a GPU has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import key_mask_cases
from key_mask_cases import Padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
KINDS = [("right", "left"), ("holes", "middle"), ("none", "right"), ("all", "right")]


def jobs() -> list[Padded]:
    out: list[Padded] = []
    for kinds in KINDS:
        for dtype in ("bfloat16", "float16", "float32"):
            out += [Padded(197, 1025, kinds, fill=fill, dtype=dtype, heads=2, d=64) for fill in ("-inf", "-1e9", "lowest")]
    for structure in ("causal", "window", "blocks"):
        out += [
            Padded(1100, 1100, ("right", "left"), structure=structure, fill=fill, dtype="bfloat16", heads=2, d=128, seed=1)
            for fill in ("-inf", "lowest")
        ]
    for bias in ("keys", "table", "own"):
        out.append(Padded(300, 1040, ("right", "middle"), bias=bias, dtype="bfloat16", heads=2, d=64, seed=2))
    for by in ("h", "bh", "length", "ints"):
        kinds = ("right", "all", "right", "none")
        out.append(Padded(129, 1024, kinds, by=by, dtype="bfloat16", heads=4, kv_heads=2, d=64))
    out.append(Padded(197, 2048, ("right", "left"), dropout=0.25, dtype="bfloat16", d=64))
    out.append(Padded(197, 2048, ("right", "left"), dtype="bfloat16", d=80))
    out.append(Padded(197, 2048, ("right", "none"), zero_rows=True, dtype="bfloat16", d=64))
    out.append(Padded(63, 20000, ("right", "holes"), dtype="bfloat16", d=64))
    return out


@pytest.mark.parametrize("padded", jobs(), ids=str)
def test_case(padded: Padded) -> None:
    wrong = key_mask_cases.compare(padded, "cuda")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("kinds,seed", [(("right", "left"), 3), (("middle", "right"), 4)])
@pytest.mark.parametrize("d", [64, 128])
def test_a_hidden_tile_is_not_read(d: int, kinds: tuple[str, str], seed: int) -> None:
    padded = Padded(300, 2048, kinds, fill="lowest", form="added", dtype="bfloat16", heads=2, d=d, seed=seed)
    wrong = key_mask_cases.poisoned(padded, "cuda", 128)
    assert not wrong, "; ".join(wrong)
