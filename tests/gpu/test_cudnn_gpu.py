"""Plain and causal attention on a GPU that has cuDNN's: which way calls and compiled sites go, and the error rule there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import Recorder, Result, compile_always, exactly, run
from fusion_kernels import attention, cudnn
from fusion_kernels.choice import force
from torch import Tensor

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cudnn.available(DEVICE), reason="needs a Hopper GPU or a later one"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # Inductor's advice; nothing here is in fp32
]
BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = [  # B, H, Hkv, N, M, D
    (2, 4, 2, 197, 197, 64), (1, 2, 1, 129, 129, 128), (2, 2, 2, 65, 65, 40), (1, 2, 2, 577, 577, 256), (1, 3, 3, 2, 129, 64),
    (2, 2, 1, 63, 200, 72),
]  # fmt: skip


def inputs(b: int, h: int, kv: int, n: int, m: int, d: int, dtype: torch.dtype, transposed: bool = False) -> list[Tensor]:
    torch.manual_seed(0)

    def make(heads: int, rows: int) -> Tensor:
        if transposed:
            return torch.randn(b, rows, heads, d, device=DEVICE, dtype=dtype).transpose(1, 2)
        return torch.randn(b, heads, rows, d, device=DEVICE, dtype=dtype)

    return [make(h, n), make(kv, m), make(kv, m), make(h, n)]


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    x = (q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -math.inf)
    return x.softmax(-1) @ v


def step(call: Any, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in tensors[:3])
    out = call(q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), tensors[3].to(dtype))]


def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled with "forward" and "backward" as cuDNN is called."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        original = getattr(cudnn, f"attention_{name}")
        spy = lambda *a, name=name, original=original: (seen.append(name), original(*a))[1]
        monkeypatch.setattr(cudnn, f"attention_{name}", spy)
    return seen


@pytest.mark.parametrize("transposed", [False, True], ids=["BHND", "BNHD"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(
    shape: tuple[int, ...], causal: bool, dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ways(monkeypatch)
    x = inputs(*shape, dtype, transposed)  # type: ignore[arg-type]
    ours = step(lambda q, k, v: attention(q, k, v, causal=causal), x, dtype)
    if causal and shape[3] != shape[4]:
        assert not seen
        return
    assert seen == ["forward", "backward"]
    exact, own = step(lambda *a: eager(*a, causal), x, torch.float64), step(lambda *a: eager(*a, causal), x, dtype)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, own, exact, strict=True):
        assert_error(name, a, b, c)


def assert_error(name: str, ours: Tensor, own: Tensor, exact: Tensor) -> None:
    error, theirs = ((t.double() - exact).abs().max().item() for t in (ours, own))
    limit = 2 * theirs + 4 * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert error <= limit, f"{name}: error {error:.2e}, eager {theirs:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("n,m", [(128, 128), (192, 192), (704, 704), (63, 320), (1, 128)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_rows_of_low_scores(causal: bool, n: int, m: int) -> None:
    """Every score is about -120: where cuDNN's backward overflows, it is not asked."""
    if causal and n != m:
        return
    q, k, v, do = inputs(1, 2, 2, n, m, 64, BF16)
    q[..., 0], k[..., 0] = 1.0, -120.0 * 8
    found = step(lambda *a: attention(*a, causal=causal), [q, k, v, do], BF16)
    assert [bool(t.isfinite().all()) for t in found] == [True] * 4


def test_the_log_sum_exp_is_that_of_the_other_kernels() -> None:
    q, k, v, _ = inputs(2, 4, 2, 197, 197, 64, BF16)
    lse = attention(q, k, v, return_lse=True)[1]
    with force("triton"):
        torch.testing.assert_close(attention(q, k, v, return_lse=True)[1], lse, rtol=1e-5, atol=1e-5)


def test_a_cotangent_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ways(monkeypatch)
    q, k, v, _ = inputs(2, 4, 4, 128, 128, 64, BF16)
    for make in (lambda o: o.sum(), lambda o: o.transpose(1, 2).contiguous().square().sum(), lambda o: o[..., 1:].sum()):
        results = []
        for way in ("cudnn", "triton"):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            with force(way):
                results.append(torch.autograd.grad(make(attention(*leaves)), leaves))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert seen == ["forward", "backward"] * 3


def test_what_the_user_has_set_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ways(monkeypatch)
    q, k, v, _ = inputs(1, 2, 2, 128, 128, 64, BF16)
    torch.use_deterministic_algorithms(True)
    try:
        attention(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        attention(q, k, v)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert not seen
    attention(q, k, v)
    assert seen == ["forward"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_shows(value: float, where: int) -> None:
    """The output is NaN or infinite where eager's is; so is some element of each gradient (where, is not promised)."""
    x = inputs(1, 2, 2, 128, 128, 64, BF16)
    x[where][0, 1, 77, 3] = value
    ours = step(lambda q, k, v: attention(q, k, v), x, BF16)
    own = step(lambda *a: eager(*a, False), x, BF16)
    assert torch.equal(ours[0].isnan(), own[0].isnan()) and torch.equal(ours[0].isinf(), own[0].isinf())
    for a, b in zip(ours[1:], own[1:], strict=True):
        assert a.isfinite().all() == b.isfinite().all()


# ---------------------------------------------------------------- compiled sites: torch's own attention takes their place


def leaves(b: int, h: int, kv: int, n: int, m: int, d: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    return [t.requires_grad_() for t in inputs(b, h, kv, n, m, d, dtype)[:3]]


def kernels(recorder: Recorder) -> list[str]:
    """Which attention the graphs call."""
    inner = [gm for graph in recorder.graphs for gm in graph.modules() if isinstance(gm, torch.fx.GraphModule)]
    targets = [n.target for gm in inner for n in gm.graph.nodes if n.op == "call_function"]
    names = {F.scaled_dot_product_attention: "sdpa"}
    return [names.get(t, "op") for t in targets if t in names or getattr(t, "namespace", None) == "fusion_kernels"]


def assert_results(ours: Result, own: Result, exact: Result) -> None:
    for (name, a), (_, b), (_, c) in zip(ours.named(), own.named(), exact.named(), strict=True):
        assert_error(name, a, b, c)


def test_queries_that_a_batch_shares() -> None:
    """Learned queries, expanded over the batch: a stride of 0."""

    def latent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.expand(k.shape[0], -1, -1, -1) @ k.mT * 0.125).softmax(-1) @ v

    q, k, v = leaves(3, 4, 4, 129, 200, 64)
    x = [q.detach()[:1].clone().requires_grad_(), k, v]
    recorder = Recorder("inductor")
    fused = run(compile_always(latent, recorder), x)
    assert_results(fused, run(latent, x), exactly(latent, x))
    assert kernels(recorder) == ["sdpa"]
