"""The Triton kernels on a GPU, beside eager in float64: programs, dtypes, head dims, lengths, strides, dropout."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import triton_cases
from triton_cases import Shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIMS = [(8, 8), (16, 32), (40, 40), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 200)]
LENGTHS = [(1, 1), (1, 300), (63, 1), (128, 128), (129, 63), (640, 512), (1024, 1024)]


def jobs() -> list[tuple[str, Shape, torch.dtype, dict[str, Any]]]:
    """Every case: (program, shape, dtype, options of `triton_cases.compare`)."""
    out: list[tuple[str, Shape, torch.dtype, dict[str, Any]]] = []
    out += [(n, Shape(2, 4, 2, 197, 261, 64, 64), t, {}) for n, t in itertools.product(triton_cases.CASES, (BF16, FP16, FP32))]
    out += [("causal", Shape(1, 2, 1, 197, 129, *d), t, {}) for d, t in itertools.product(DIMS, (BF16, FP32))]
    names = ("plain", "causal", "strictly anticausal, -1e9", "window", "bias")
    out += [(n, Shape(2, 2, 2, *size, 128, 128), BF16, {}) for n, size in itertools.product(names, LENGTHS)]
    out += [(n, Shape(2, 2, 2, *size, 64, 64), FP32, {}) for n, size in itertools.product(("plain", "causal"), LENGTHS)]
    out += [
        ("causal", Shape(2, 3, 1, 197, 261, 64, 64), t, {"p": p}) for p, t in itertools.product((0.1, 0.5, 1.0), (BF16, FP32))
    ]
    out += [(n, Shape(2, 4, 4, 256, 256, 64, 64), BF16, {"transposed": False}) for n in ("plain", "causal", "alibi")]
    return out


@pytest.mark.parametrize("name,shape,dtype,options", jobs(), ids=lambda x: str(x).replace("torch.", "").replace("Shape", ""))
def test_case(name: str, shape: Shape, dtype: torch.dtype, options: dict[str, Any]) -> None:
    results = triton_cases.compare(name, shape, dtype, "cuda", **options)
    for what, (ours, eager) in zip(triton_cases.OUTPUTS, results, strict=False):
        limit = triton_cases.allowed(what, eager, dtype)
        assert ours <= limit, f"{what}: error {ours:.2e}, eager {eager:.2e}, allowed {limit:.2e}"
