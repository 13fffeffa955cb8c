"""Which programs and calls go to cuDNN: what can be said without a GPU. Its numbers are in tests/gpu."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fusion_kernels import cudnn
from fusion_kernels.choice import kernel_for
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load

Q, K = index("q"), index("k")
SCALED = apply("mul", SCORE, const(0.125))
NEVER = const(-math.inf)
PLAIN = Program(SCALED)
CAUSAL = Program(apply("where", apply("le", K, Q), SCALED, NEVER))
HALF = torch.bfloat16


def masked(p: Node, fill: Node = NEVER) -> Program:
    return Program(apply("where", p, SCALED, fill))


@pytest.mark.parametrize("program", [Program(SCORE), PLAIN, CAUSAL, masked(apply("ge", Q, K), const(-1e9))])
def test_expressed(program: Program) -> None:
    assert cudnn.expresses(program)


OTHERS = {
    "softcap": Program(apply("tanh", SCALED)),
    "strictly causal": masked(apply("lt", K, Q)),  # its first row has no key
    "anticausal": masked(apply("le", Q, K)),
    "window": masked(apply("and", apply("le", K, Q), apply("lt", apply("sub", Q, K), const(256)))),
    "weak mask": masked(apply("le", K, Q), const(-10.0)),
    "padding": Program(apply("where", load(0, "bool", [index("b"), K]), SCALED, NEVER), (Capture("bool", 2),)),
    "bias": Program(apply("add", SCALED, load(0, "float", [Q, K])), (Capture("float", 2),)),
    "scale of a tensor": Program(apply("mul", SCORE, load(0, "float", [const(0)])), (Capture("float", 1),)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_not_expressed(name: str) -> None:
    assert not cudnn.expresses(OTHERS[name])


def call(n: int = 128, m: int = 128, d: int = 64, dv: int = 64, dtype: torch.dtype = HALF, **changes: Any) -> bool:
    q = torch.zeros(2, n, 4, d, dtype=dtype).transpose(1, 2)
    k, v = torch.zeros(2, 2, m, d, dtype=dtype), torch.zeros(2, 2, m, dv, dtype=dtype)
    arguments = {"q": q, "k": k, "v": v, "program": PLAIN, "dropout_p": 0.0, **changes}
    return cudnn.supports(**arguments)


def test_supported() -> None:
    assert call() and call(dtype=torch.float16) and call(n=197, m=129) and call(program=CAUSAL) and call(d=256, dv=256)
    assert call(program=CAUSAL, n=192, m=192) and call(n=192) and call(m=193)


SHIFTED = torch.zeros(2 * 2 * 128 * 64 + 1, dtype=HALF)[1:].view(2, 2, 128, 64)
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "a dtype of v's own": {"v": torch.zeros(2, 2, 128, 64, dtype=torch.float16)},
    "dropout": {"dropout_p": 0.1},
    "head dim": {"d": 68, "dv": 68},
    "v's head dim": {"dv": 32},
    "few keys": {"m": 63},
    "causal, of two lengths": {"program": CAUSAL, "m": 256},
    "not aligned": {"k": SHIFTED},
    "no unit stride": {"k": torch.zeros(2, 2, 64, 128, dtype=HALF).mT},
    "odd strides": {"k": torch.zeros(2, 2, 128, 68, dtype=HALF)[..., :64]},
    "expanded": {"k": torch.zeros(1, 2, 128, 64, dtype=HALF).expand(2, 2, 128, 64)},
    "no query": {"n": 0},
    "a single query": {"n": 1},
    "half a tile of keys": {"m": 192},
    "half a tile": {"n": 64, "m": 64},
    "a large batch": {"q": torch.zeros(65536, 1, 1, 8, dtype=HALF), "d": 8, "dv": 8},
    "many heads": {"q": torch.zeros(1, 65536, 1, 8, dtype=HALF), "d": 8, "dv": 8},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name: str) -> None:
    assert not call(**UNSUPPORTED[name])


def test_batch_and_heads() -> None:
    sizes = {"n": 128, "m": 128, "d": 64, "dv": 64, "causal": False}
    assert cudnn.fits(65535, 65535, **sizes)
    assert not cudnn.fits(65536, 1, **sizes) and not cudnn.fits(1, 65536, **sizes)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if there were one; the caches of what is there are empty before and after."""
    caches = (cudnn._hopper, cudnn._sound)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


# 9.15.0 is the last release that fails at lengths that are no multiple of 128
@pytest.mark.parametrize(("version", "sound"), [(None, False), (91002, False), (91500, False), (91501, True), (91900, True)])
def test_versions(hopper: pytest.MonkeyPatch, version: int | None, sound: bool) -> None:
    hopper.setattr(torch.backends.cudnn, "version", lambda: version)
    device = torch.device("cuda", 0)
    assert cudnn.available(device) == sound
    assert kernel_for(device, HALF, HALF, CAUSAL) == ("cudnn" if sound else "triton")


def test_older_devices(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(torch.backends.cudnn, "version", lambda: 91900)
    hopper.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert not cudnn.available(torch.device("cuda", 0))


def test_devices() -> None:
    assert not cudnn.available(torch.device("cpu"))
    assert kernel_for("cpu", HALF, HALF, CAUSAL) == "aten-cpu"
    if not torch.cuda.is_available():
        assert kernel_for("cuda", HALF, HALF, CAUSAL) == "triton"
