"""Dropout on a GPU: its mask is read, and everything else is held to eager under that mask."""

from __future__ import annotations

import pytest
import torch
from checks import Recorder, assert_fused, compile_always
from dropped import Dropping, P, assert_dropout, assert_rate, kept
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusion_pass

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # Inductor's advice; nothing here is in fp32
]
BF16, FP16 = torch.bfloat16, torch.float16


def leaves(b: int, h: int, kv: int, n: int, m: int, d: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (b, h, n, d), (b, kv, m, d), (b, kv, m, d)
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


DROPPED = {  # B, H, Hkv, N, M, D; causal; dtype; what compiles the graph
    "full": ((2, 4, 4, 128, 128, 64), False, BF16, "inductor"),
    "causal": ((2, 4, 4, 197, 197, 128), True, BF16, "inductor"),
    "float16": ((2, 2, 2, 129, 129, 64), True, FP16, "aot_eager"),
    "odd lengths": ((1, 3, 3, 63, 197, 72), False, BF16, "aot_eager"),
    "grouped": ((2, 4, 2, 256, 256, 64), True, BF16, "aot_eager"),
    "two queries": ((2, 4, 4, 2, 129, 64), False, BF16, "aot_eager"),
    "head dim 40": ((2, 2, 2, 577, 577, 40), True, BF16, "aot_eager"),
    "head dim 256": ((1, 2, 2, 129, 129, 256), False, BF16, "aot_eager"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_in_training(name: str) -> None:
    """Rate, seed, output and gradients, by the mask that was drawn; in our kernels, plain sites too."""
    shape, causal, dtype, inner = DROPPED[name]
    x, recorder = leaves(*shape, dtype), Recorder(inner)
    call = compile_always(Dropping(P, causal), recorder)
    assert_dropout(call, x, P, causal)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    (site,) = fusion_pass.last_report().fused
    assert (site.verdict.kernel, site.verdict.backward) == ("triton", "triton")


@pytest.mark.parametrize("p", [0.01, 0.0625, 0.1, 0.3, 0.5, 0.9375])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_rate_of_dropout(causal: bool, d: int, p: float) -> None:
    """Of millions of probabilities: a rate that is off by a thousandth shows."""
    q, k, v = leaves(32, 8, 8, d if causal else 512, d, d)
    assert_rate(kept(compile_always(Dropping(p, causal), Recorder("aot_eager")), q, k, v, 3), p, causal)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_two_sites_draw_apart(inner: str) -> None:
    one = Dropping()
    both = compile_always(lambda *a: (one(*a), one(*a)), Recorder(inner))
    first, second = both(*leaves(2, 4, 4, 128, 128, 64))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_calls_draw_apart(inner: str) -> None:
    q, k, v = leaves(2, 4, 4, 128, 128, 64)
    call = compile_always(Dropping(), Recorder(inner))
    torch.manual_seed(5)
    first, second = call(q, k, v), call(q, k, v)
    torch.manual_seed(5)
    assert torch.equal(first, call(q, k, v)) and not torch.equal(first, second)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_checkpoint_around_it(inner: str) -> None:
    """It puts torch's generator back before it runs the compiled graph again."""
    call = compile_always(Dropping(causal=True), Recorder(inner))
    x = leaves(2, 4, 4, 129, 129, 64)
    assert_dropout(lambda *a: checkpoint(call, *a, use_reentrant=False), x, P, True)  # pyright: ignore


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_checkpoint_inside(inner: str) -> None:
    """The mask is that of the forward: with v the identity, out is the dropped probabilities, and dv is out^T do."""
    module = Dropping(0.5)
    call = compile_always(lambda *a: checkpoint(module, *a, use_reentrant=False), Recorder(inner))
    q, k, v = leaves(2, 4, 4, 128, 128, 128)
    v = torch.eye(128, device=DEVICE, dtype=BF16).expand(v.shape).contiguous().requires_grad_()
    out = call(q, k, v)
    do = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, do)
    torch.testing.assert_close(dv, (out.detach().double().mT @ do.double()).to(BF16), rtol=2e-2, atol=1e-2)
