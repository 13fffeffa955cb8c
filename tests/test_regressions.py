"""The known wrong results of torch's own attention patterns: each must come out as eager here, fused or refused.

Each test asserts what the issue got wrong, with the numbers chosen so that the wrong answer is far from the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from checks import Recorder, assert_rule, compile_always, exactly, run, sites_text
from torch import Tensor, nn
from torch._inductor import config

import fusion_pass
from fusion_pass.site import Reason


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def check(fn: Callable[..., Any], inputs: Sequence[Tensor], *, fused: int) -> None:
    """By the rule through the eager and the Inductor backend, with `fused` sites fused in each."""
    eager, exact = run(fn, inputs), exactly(fn, inputs)
    assert_rule(run(compile_always(fn, Recorder("eager")), inputs), eager, exact, "eager inside")
    assert len(fusion_pass.last_report().fused) == fused, sites_text(fusion_pass.last_report())
    torch._dynamo.reset()
    # Inductor's own patterns see what the pass refused, and two of them are wrong: they are off, ours are judged.
    with config.patch(pattern_matcher=False):
        compiled = torch.compile(fn, backend=fusion_pass.make_backend(when="always"), fullgraph=True)
        assert_rule(run(compiled, inputs), eager, exact, "Inductor inside")
    assert len(fusion_pass.last_report().fused) == fused, sites_text(fusion_pass.last_report())


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("square", [False, True], ids=["oblong", "square"])
def test_softmax_over_another_dim(dim: int, square: bool) -> None:
    """pytorch#196468: the dim of the softmax was not looked at."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.softmax(torch.matmul(q, k.transpose(-2, -1)).div(3.0), dim=dim)
        return torch.nn.functional.dropout(p, 0.23, training=False).matmul(v)

    n = 4 if square else 2
    check(fn, normal((4, 4, n, 8), (4, 4, 4, 8), (4, 4, 4, 8)), fused=0)
    assert [s.verdict.reason for s in fusion_pass.last_report().sites] == [Reason.SOFTMAX_DIM]


def test_softmax_over_the_last_dim_is_the_control() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.matmul(q, k.transpose(-2, -1)).div(3.0), dim=3).matmul(v)

    check(fn, normal((4, 4, 2, 8), (4, 4, 3, 8), (4, 4, 3, 8)), fused=1)


class PermutedKeys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 4).transpose(1, 2)
        k = self.k(x).view(b, n, 4, 4).permute(0, 2, 3, 1)  # (B, H, D, N) in one step
        v = self.v(x).view(b, n, 4, 4).transpose(1, 2)
        return (torch.matmul(q, k) * 0.5).softmax(-1) @ v


def test_keys_permuted_in_one_step() -> None:
    """pytorch#195320: any permutation of k passed for a transpose; with every size 4, nothing else told them apart."""
    check(PermutedKeys(), normal((4, 4, 16)), fused=1)


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 1, 3, 2), (1, 0, 3, 2), (0, 3, 2, 1), (2, 1, 3, 0), (0, 1, 2, 3)])
def test_every_permutation_of_square_keys(order: tuple[int, int, int, int]) -> None:
    """The same, without a projection: (B, H, N, D) of size 4 each, k permuted, q and v straight."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.matmul(q, k.permute(order)) * 0.5).softmax(-1).matmul(v)

    check(fn, normal((4, 4, 4, 4), (4, 4, 4, 4), (4, 4, 4, 4)), fused=1)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("gradient", [False, True], ids=["fixed", "learned"])
def test_tensor_scale(shape: tuple[int, ...], gradient: bool) -> None:
    """pytorch#191203: a 0-d tensor as scale did not compile; here it is part of the score, gradient and all."""
    scale = torch.full(shape, 0.5).requires_grad_(gradient)

    def fn(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        mask = torch.triu(torch.full((8, 8), -1e9), diagonal=1)
        return torch.softmax(q @ k.transpose(-2, -1) / scale + mask, dim=-1) @ v

    check(fn, [*normal((1, 2, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8)), scale], fused=1)


class OtherScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).permute([0, 2, 1, 3]) for f in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-2, -1)).div(1 / math.sqrt(8))  # times sqrt(8), not over it
        return (scores + mask).softmax(dim=-1).matmul(v)


def test_scale_that_is_not_the_default() -> None:
    """pytorch#174049: the code's scale was dropped for 1 / sqrt(D)."""
    mask = torch.zeros(2, 1, 1, 9).masked_fill(torch.arange(9) > 6, -torch.inf)
    check(OtherScale(), [*normal((2, 9, 4, 64)), mask], fused=1)


def test_five_dims() -> None:
    """pytorch#195589: 5-D operands gave an invalid graph."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.view(1, 1, 2, 1, 8), k.view(1, 1, 2, 2, 8), v.view(1, 1, 2, 2, 8)
        return (torch.matmul(q, k.transpose(-2, -1)) / 8**0.5).softmax(-1).matmul(v).view(2, 1, 8)

    check(fn, normal((2, 1, 8), (2, 2, 8), (2, 2, 8)), fused=1)


def test_mask_on_the_left_of_the_sum() -> None:
    """pytorch#195782: mask + scores was not seen where scores + mask was."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (mask + q @ k.mT * 0.3).softmax(-1) @ v

    check(fn, normal((2, 2, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 1, 1, 9)), fused=1)


def test_scale_by_dynamic_head_dim() -> None:
    """pytorch#194444: head_dim ** 0.5 under dynamic shapes lost the fusion."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

    inputs = normal((2, 2, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    compiled = compile_always(fn, Recorder("aot_eager"), dynamic=True)
    assert_rule(run(compiled, inputs), run(fn, inputs), exactly(fn, inputs))
    assert len(fusion_pass.last_report().fused) == 1, sites_text(fusion_pass.last_report())


# ---------------------------------------------------------------- ours


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_rows_that_are_almost_all_one_keys(scale: float) -> None:
    """dp - delta is 0 there but for roundings: ATen takes delta from the output on a CPU, 6 times beyond the rule."""
    (x,) = normal((2, 3, 37, 64))
    fn = lambda x: torch.softmax(scale * (x @ x.mT), -1) @ x
    check(fn, [x], fused=1)
