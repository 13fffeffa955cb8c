"""Dropout of the probabilities, inside the fused op: where it may stand, its rate, its scale, its seed, its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import Recorder, assert_fused, compile_always
from dropped import Dropping, assert_dropout
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusion_pass

P = 0.3


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def operands(n: int = 63, m: int = 129, d: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, 3, n, d), (2, 3, m, d), (2, 3, m, d))
    return tuple(normal(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))  # pyright: ignore[reportReturnType]


def functional(q: Tensor, k: Tensor, v: Tensor, p: float = P) -> Tensor:
    return F.dropout((q @ k.mT * 0.25).softmax(-1), p) @ v


def aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.dropout((q @ k.mT * 0.25).softmax(-1), P, True) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a copy: softmax itself keeps its output for the backward."""
    return F.dropout((q @ k.mT * 0.25).softmax(-1).clone(), P, inplace=True) @ v


def after_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.mT * 0.25, -1, dtype=torch.float64).to(q.dtype), P) @ v


def before_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.mT * 0.25, -1, dtype=torch.float64), P).to(q.dtype) @ v


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, _ = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    probabilities = torch.bmm(q * 0.25, k.transpose(1, 2)).softmax(-1).view(b, h, n, -1)
    return torch.bmm(F.dropout(probabilities, P).view(b * h, n, -1), v).view(b, h, n, -1)


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(functional, q, k, v, use_reentrant=False)


def mask_of_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT * 0.25).softmax(-1)
    return (p * F.dropout(torch.ones_like(p), P)) @ v


def mask_by_bernoulli(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT * 0.25).softmax(-1)
    return (p * torch.empty_like(p).bernoulli_(1 - P).div_(1 - P)) @ v


def divided_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT * 0.25).softmax(-1)
    return (p * torch.bernoulli(torch.full_like(p, 1 - P)) / (1 - P)) @ v


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(P)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(self.dropout((q @ k.mT * 0.25).softmax(-1)), v)


def fuse(fn: Callable[..., Any], inner: str = "aot_eager", **options: Any) -> tuple[Callable[..., Any], Recorder]:
    recorder = Recorder(inner)
    return compile_always(fn, recorder, **options), recorder


PLACES = [functional, aten, in_place, after_cast, before_cast, merged, checkpointed, Module()]
PLACES += [mask_of_ones, mask_by_bernoulli, divided_afterwards]


@pytest.mark.parametrize("fn", PLACES, ids=lambda f: getattr(f, "__name__", "module"))
def test_fused_wherever_it_stands(fn: Callable[..., Any]) -> None:
    """Fused with the rate known; the same seed gives the same result, another seed another; the gradients likewise."""
    compiled, recorder = fuse(fn)
    q, k, v = operands()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = compiled(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert_fused(fusion_pass.last_report(), recorder, 1)
    site = fusion_pass.last_report().fused[0].attention
    assert site is not None and site.dropout_p == pytest.approx(P, abs=1e-12)  # in place it is read from 1 - p
    for first, same, other in zip(*results, strict=True):
        assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    """With q = 0 every probability is 1/m, and v = identity shows each: 0 or 1 / (m (1 - p)), kept at rate 1 - p."""
    n, m = 129, 129
    compiled, _ = fuse(lambda q, k, v: functional(q, k, v, p), "eager")
    torch.manual_seed(3)
    shown = compiled(torch.zeros(2, 3, n, 16), torch.zeros(2, 3, m, 16), torch.eye(m).expand(2, 3, m, m)) * m
    kept = shown > 0
    torch.testing.assert_close(shown[kept], torch.full_like(shown[kept], 1 / (1 - p)), rtol=1e-5, atol=0)
    draws = 2 * 3 * n * m
    deviation = math.sqrt(p * (1 - p) / draws)
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * deviation
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):  # no key, row or head is favoured: each mean within 5.5 deviations of its own
        means = kept.float().mean(dims)
        assert float((means - (1 - p)).abs().max()) < 5.5 * deviation * math.sqrt(means.numel())


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_heads_rows_and_calls_are_independent() -> None:
    compiled, _ = fuse(lambda q, k, v: functional(q, k, v, 0.5), "eager")
    zeros, eye = torch.zeros(2, 3, 129, 16), torch.eye(129).expand(2, 3, 129, 129)
    torch.manual_seed(4)
    first, second = ((compiled(zeros, zeros, eye) > 0).float() for _ in range(2))
    limit = 5 / math.sqrt(2 * 3 * 129 * 128)
    assert abs(_correlation(first, second)) < limit
    assert abs(_correlation(first[:, :, 1:], first[:, :, :-1])) < limit
    assert abs(_correlation(first[..., 1:], first[..., :-1])) < limit
    assert abs(_correlation(first[:, 0], first[:, 1])) < 5 / math.sqrt(2 * 129 * 129)
    assert abs(_correlation(first[0], first[1])) < 5 / math.sqrt(3 * 129 * 129)


def test_expectation_is_the_result_without_dropout() -> None:
    compiled, _ = fuse(functional, "eager")
    q, k, v = (x.detach() for x in operands(n=17, m=33))
    torch.manual_seed(5)
    draws = torch.stack([compiled(q, k, v) for _ in range(400)])
    plain = functional(q, k, v, 0.0)
    deviation = draws.std(0) / math.sqrt(400)
    assert float(((draws.mean(0) - plain).abs() / deviation.clamp(min=1e-6)).max()) < 5.5


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_forward_and_backward_draw_the_same_mask(inner: str) -> None:
    """out is linear in v: with the mask of the forward, v . d out/d v = out . cotangent; with another one it is not."""
    compiled, _ = fuse(functional, inner)
    q, k, v = operands(dtype=torch.float64)
    torch.manual_seed(6)
    out = compiled(q, k, v)
    cotangent = normal(*out.shape, seed=9, dtype=torch.float64).detach()
    gradient = torch.autograd.grad(out, v, cotangent)[0]
    torch.testing.assert_close((gradient * v).sum(), (out * cotangent).sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fn", [functional, checkpointed], ids=["plain", "checkpointed"])
def test_gradients_by_finite_difference(fn: Callable[..., Any]) -> None:
    """Under a fixed seed the op is a smooth function: central differences along a random direction, float64."""
    compiled, _ = fuse(fn)
    inputs = operands(n=17, m=33, dtype=torch.float64)
    directions = [normal(*x.shape, seed=20 + i, dtype=torch.float64).detach() for i, x in enumerate(inputs)]
    cotangent = normal(2, 3, 17, 16, seed=30, dtype=torch.float64).detach()

    def value(step: float) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(7)
        moved = [(x + step * d).detach().requires_grad_() for x, d in zip(inputs, directions, strict=True)]
        return (compiled(*moved) * cotangent).sum(), moved

    at, moved = value(0.0)
    analytic = sum((g * d).sum() for g, d in zip(torch.autograd.grad(at, moved), directions, strict=True))
    numeric = (value(1e-6)[0] - value(-1e-6)[0]).detach() / 2e-6
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=1e-6)


def test_two_sites_draw_apart() -> None:
    """The same operands twice in one graph: two seeds, so no common-subexpression pass may merge them."""

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return functional(q, k, v), functional(q, k, v)

    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled, recorder = fuse(both, inner)
        first, second = compiled(*operands())
        assert_fused(fusion_pass.last_report(), recorder, 2)
        assert not torch.equal(first, second), inner


def test_rate_one_and_rate_zero() -> None:
    q, k, v = operands()
    compiled, _ = fuse(lambda q, k, v: functional(q, k, v, 1.0))
    out = compiled(q, k, v)
    assert bool((out == 0).all()) and all(bool((g == 0).all()) for g in torch.autograd.grad(out.sum(), (q, k, v)))
    compiled, _ = fuse(lambda q, k, v: functional(q, k, v, 0.0))
    torch.testing.assert_close(compiled(q, k, v), functional(q, k, v, 0.0), rtol=1e-5, atol=1e-6)


def test_module_follows_its_mode() -> None:
    """eval() after train(): a new graph, without dropout and without a seed."""
    module = Module()
    compiled, recorder = fuse(module)
    compiled(*operands())
    module.eval()
    q, k, v = operands()
    torch.testing.assert_close(compiled(q, k, v), module(q, k, v), rtol=1e-5, atol=1e-6)
    site = fusion_pass.last_report().fused[0].attention
    assert site is not None and site.dropout_p == 0.0 and len(recorder.graphs) == 2


def test_later_random_numbers_still_depend_on_the_seed() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional(q, k, v) + torch.rand_like(q)

    compiled, _ = fuse(fn)
    torch.manual_seed(8)
    a = compiled(*operands())
    torch.manual_seed(8)
    assert torch.equal(a, compiled(*operands()))


@pytest.mark.parametrize(
    "fn,heads,lengths,dtype,inner",
    [
        (Dropping(P), 4, (129, 129), torch.bfloat16, "eager"),
        (Dropping(P, causal=True), 4, (129, 129), torch.float32, "inductor"),
        (Dropping(P, causal=True), 2, (197, 197), torch.float16, "aot_eager"),
        (Dropping(0.5), 4, (63, 197), torch.bfloat16, "aot_eager"),
        (mask_by_bernoulli, 4, (129, 129), torch.bfloat16, "eager"),
        (in_place, 4, (129, 129), torch.bfloat16, "eager"),
    ],
    ids=["full", "causal", "grouped", "two lengths", "by bernoulli", "in place"],
)
def test_by_the_mask_that_was_drawn(
    fn: Callable[..., Tensor], heads: int, lengths: tuple[int, int], dtype: torch.dtype, inner: str
) -> None:
    torch.manual_seed(0)
    n, m = lengths
    shapes = (2, 4, n, 16), (2, heads, m, 16), (2, heads, m, 16)
    inputs, recorder = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes], Recorder(inner)
    p = fn.dropout.p if isinstance(fn, Dropping) else P
    assert_dropout(compile_always(fn, recorder), inputs, p, isinstance(fn, Dropping) and fn.causal)
    assert_fused(fusion_pass.last_report(), recorder, 1)


def test_a_checkpoint_around_it() -> None:
    """What is run again, outside of the compiled graph, draws the same mask: torch puts its generator back."""
    call = compile_always(Dropping(P), Recorder("aot_eager"))
    inputs = [torch.randn(2, 4, 129, 16, requires_grad=True) for _ in range(3)]
    assert_dropout(lambda *a: checkpoint(call, *a, use_reentrant=False), inputs, P, causal=False)  # pyright: ignore
