"""Masks added to float16 scores: a row that they hide whole is what eager makes of it, and others lose nothing by it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from checks import Recorder, assert_fused, assert_rule, compile_always, error, exactly, run
from fusion_kernels.float16_sums import LARGE
from torch import Tensor

import fusion_pass

HALF = torch.float16
LOWEST = torch.finfo(HALF).min


def given(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + mask).softmax(-1) @ v


def subtracted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = q @ k.mT * 0.3
    s -= -mask
    return torch.softmax(s, -1, dtype=torch.float32).to(v.dtype) @ v


def of_bools(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + torch.where(mask == 0, 0.0, LOWEST).to(HALF)).softmax(-1) @ v


def one_minus(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + (1.0 - (mask == 0).to(HALF)) * -1e4).softmax(-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v, mask = (t.flatten(0, 1) for t in (q, k, v, mask.expand(2, 3, 33, 17)))
    return torch.baddbmm(mask, q, k.mT, alpha=0.3).softmax(-1) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    s = q @ k.mT * 0.3 + mask
    e = torch.exp(s - s.max(-1, keepdim=True).values.detach())
    return (e / e.sum(-1, keepdim=True)) @ v


def operands(scale: float = 1.0) -> list[Tensor]:
    """q, k, v and a mask that hides rows 0 to 8 whole, and some keys of the others."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((torch.randn(2, 3, n, 16, generator=generator) * scale).half().requires_grad_() for n in (33, 17, 17))
    hidden = torch.rand(2, 1, 33, 17, generator=generator) < 0.3
    hidden[:, :, :9] = True
    hidden[:, :, 9:, 0] = False
    return [q, k, v, torch.zeros(2, 1, 33, 17, dtype=HALF).masked_fill(hidden, LOWEST)]


@pytest.mark.parametrize("fn", [given, subtracted, of_bools, one_minus, baddbmm, by_hand], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_hidden_rows_are_eagers(fn: Callable[..., Tensor], dynamic: bool) -> None:
    inputs, recorder = operands(), Recorder()
    fused = run(compile_always(fn, recorder, dynamic=dynamic), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    eager = run(fn, inputs)
    assert_rule(fused, eager, exactly(fn, inputs))
    for out in (fused.outputs[0].view(2, 3, 33, 16)[:, :, :9], eager.outputs[0].view(2, 3, 33, 16)[:, :, :9]):
        assert fn is one_minus or out.std(-2).max() < 1e-3  # the mean of all values, whatever the query
    for (name, x), (_, e) in zip(fused.named(), eager.named(), strict=True):
        torch.testing.assert_close(x, e, rtol=4e-3, atol=4e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sum_past_float16_is_infinite() -> None:
    """Scores at or below -16 under finfo.min: -inf, and a row of them is NaN, as in eager."""
    inputs, recorder = operands(scale=6.0), Recorder()
    fused, eager = run(compile_always(given, recorder), inputs), run(given, inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    finite = eager.outputs[0].isfinite()
    assert torch.equal(fused.outputs[0].isfinite(), finite)
    weights = (inputs[0] @ inputs[1].mT * 0.3 + inputs[3])[:, :, :9]
    assert bool(weights.isneginf().any()) and bool((weights == LOWEST).any())


def test_a_learned_bias_is_not_rounded() -> None:
    """Sums of ordinary size keep the digits of fp32: at most half of eager's error is left."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, bias = (torch.randn(2, 3, 33, 33, generator=generator).half() * c for c in (1, 1, 1, 8))
    fused = run(compile_always(given, Recorder()), (q, k, v, bias))
    exact = exactly(given, (q, k, v, bias)).outputs[0]
    assert error(fused.outputs[0], exact) < error(run(given, (q, k, v, bias)).outputs[0], exact) / 2


def test_only_float16_and_only_what_may_be_a_mask() -> None:
    def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        near = torch.arange(33)[:, None] - torch.arange(17)
        return (q @ k.mT + slopes * near + torch.where(near < 0, -math.inf, 0.0).to(q.dtype)).softmax(-1) @ v

    def program(fn: Callable[..., Tensor], *inputs: Tensor) -> str:
        compile_always(fn, Recorder())(*inputs)
        (site,) = fusion_pass.last_report().fused
        assert site.attention is not None
        assert "where(" not in site.attention.formula or fn is alibi
        return site.attention.program.text

    *qkv, mask = (x.detach() for x in operands())
    assert f"const {LARGE}" in program(given, *qkv, mask)
    assert "round" not in program(given, *(x.bfloat16() for x in qkv), mask.bfloat16())
    assert f"const {LARGE}" not in program(alibi, *qkv, torch.ones(3, 1, 1, dtype=HALF))
