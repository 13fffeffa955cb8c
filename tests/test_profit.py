"""When a site that could be fused is left alone because it would not pay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sympy
import torch

from fusion_pass import legality

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTH = sympy.Symbol("s0", integer=True, positive=True)


def reason(kernel: str, device: torch.device, *sizes: object, trained: bool = False, learned: bool = False) -> str | None:
    """sizes: B, H, N, M."""
    b, h, n, m = map(sympy.sympify, sizes)
    match = SimpleNamespace(q=SimpleNamespace(shape=(b, h, n, 64)), k=SimpleNamespace(shape=(b, h, m, 64)))
    return legality.profitable(match, kernel, device, trained, learned)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["triton", "cudnn"])
def test_on_a_gpu(kernel: str) -> None:
    assert reason(kernel, GPU, 1, 16, 256, 256) == "1048576 scores are too few for a fused kernel to pay"
    assert reason(kernel, GPU, 4, 16, 256, 256) is None
    assert reason(kernel, GPU, 1, 1, 16, 100_000) == "1600000 scores are too few for a fused kernel to pay"
    assert reason(kernel, GPU, 1, 16, LENGTH, LENGTH) is None  # a length that is not known may be long


def test_windows_with_a_learned_bias() -> None:
    few = "49 keys are too few for the gradient of a learned bias to pay"
    assert reason("triton", GPU, 4096, 4, 49, 49, trained=True, learned=True) == few
    assert reason("triton", GPU, 4096, 4, 49, 49, trained=True) is None
    assert reason("triton", GPU, 4096, 4, 49, 49) is None
    assert reason("triton", GPU, 4096, 4, 64, 64, trained=True, learned=True) is None
    assert reason("triton", GPU, 4096, 4, LENGTH, LENGTH, trained=True, learned=True) is None


def test_on_a_cpu() -> None:
    assert reason("aten-cpu", CPU, 1, 1, 1, 1) is None
    few = "2097152 scores are too few for a fused backward to pay on a CPU"
    assert reason("aten-cpu", CPU, 16, 8, 128, 128, trained=True) == few
    assert reason("aten-cpu", CPU, 2, 8, 1024, 1024, trained=True) is None
    assert reason("aten-cpu", CPU, 1, 1, LENGTH, LENGTH, trained=True) is None
    assert reason("tiled", CPU, 1, 12, 512, 512) == "3145728 scores fit the cache of a CPU, and no ATen kernel expresses the site"
    assert reason("tiled", CPU, 1, 16, 2048, 2048) is None
