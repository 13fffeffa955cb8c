"""The Triton kernels on a GPU, beside eager in float64: programs, dtypes, head dims, lengths, strides, dropout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import triton_cases
from triton_cases import Shape

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(name: str, shape: Shape, dtype: torch.dtype, transposed: bool = True, p: float = 0.0) -> None:
    results = triton_cases.compare(name, shape, dtype, "cuda", transposed, p)
    print(f"{name} {shape} {dtype} p={p}: " + " ".join(f"{ours:.1e}/{eager:.1e}" for ours, eager in results))
    for what, (ours, eager) in zip(triton_cases.OUTPUTS, results, strict=False):
        limit = triton_cases.allowed(what, eager, dtype)
        assert ours <= limit, f"{what}: error {ours:.2e}, eager {eager:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", triton_cases.CASES)
def test_programs(name: str, dtype: torch.dtype) -> None:
    check(name, Shape(2, 4, 2, 197, 261, 64, 64), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("d,dv", [(8, 8), (16, 32), (40, 40), (72, 72), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (64, 200)])
def test_head_dims(d: int, dv: int, dtype: torch.dtype) -> None:
    check("causal", Shape(1, 2, 1, 197, 129, d, dv), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("n,m", [(1, 1), (1, 300), (63, 1), (128, 128), (129, 63), (640, 512), (1024, 1024)])
@pytest.mark.parametrize("name", ["plain", "causal", "strictly anticausal, -1e9", "window", "bias"])
def test_lengths(name: str, n: int, m: int, dtype: torch.dtype) -> None:
    check(name, Shape(2, 2, 2, n, m, 128, 128), dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout(p: float, dtype: torch.dtype) -> None:
    check("causal", Shape(2, 3, 1, 197, 261, 64, 64), dtype, p=p)


@pytest.mark.parametrize("name", ["plain", "causal", "alibi"])
def test_contiguous_memory(name: str) -> None:
    check(name, Shape(2, 4, 4, 256, 256, 64, 64), BF16, transposed=False)
