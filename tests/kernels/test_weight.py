"""Weights, what is done to probabilities after the softmax: the reference and its tiled form beside eager, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_kernels import attention, tiled
from fusion_kernels.choice import choose, force
from fusion_kernels.cudnn import expresses
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, parse
from torch import Tensor

B_, H_, Q, K = (index(n) for n in "bhqk")
SCALED = apply("mul", SCORE, const(0.25))
LOWEST = torch.finfo(torch.float32).min
ZERO = const(0.0)
SEES = apply("lt", K, Q)  # query 0 sees no key
Weigh = Callable[[Tensor, Tensor], Tensor]

# name -> the weight, the shape of what it reads, and the same in torch: (p (2, 4, 63, 129), w) -> p'
LATE = torch.arange(129) < torch.arange(63)[:, None]
WEIGHTS: dict[str, tuple[Node, tuple[int, ...], Weigh]] = {
    "head": (apply("mul", SCORE, load(0, "float", [H_])), (4,), lambda p, w: p * w.view(-1, 1, 1)),
    "row": (apply("div", SCORE, load(0, "float", [B_, H_, Q])), (2, 4, 63), lambda p, w: p / w.unsqueeze(-1)),
    "table": (apply("mul", load(0, "float", [H_, Q, K]), SCORE), (4, 63, 129), lambda p, w: w * p),
    "again": (apply("where", SEES, SCORE, ZERO), (), lambda p, w: p.masked_fill(~LATE, 0.0)),
    "other": (apply("where", apply("gt", K, Q), SCORE, ZERO), (), lambda p, w: p.masked_fill(~(LATE.logical_not().triu(1)), 0.0)),
    "guard": (apply("where", apply("isnan", SCORE), ZERO, SCORE), (), lambda p, w: torch.where(p.isnan(), 0.0, p)),
    "both": (
        apply("mul", apply("where", SEES, apply("neg", SCORE), ZERO), load(0, "float", [B_, K])),
        (2, 129),
        lambda p, w: torch.where(LATE, -p, 0.0) * w[:, None, None],
    ),
    "either": (
        apply("where", SEES, apply("mul", SCORE, load(0, "float", [])), SCORE),
        (),
        lambda p, w: torch.where(LATE, p * w, p),
    ),
}


def fused(*operands: Tensor, **arguments: Any) -> Tensor:
    out = attention(*operands, **arguments)
    assert isinstance(out, Tensor)
    return out


def program(weight: Node, shape: tuple[int, ...], fill: float | None, **options: Any) -> Program:
    root = SCALED if fill is None else apply("where", SEES, SCALED, const(fill))
    return Program(root, (Capture("float", len(shape)),), weight=weight, **options)


def by_hand(q: Tensor, k: Tensor, v: Tensor, w: Tensor, fill: float | None, weigh: Weigh, zero_rows: bool = False) -> Tensor:
    x = q @ k.repeat_interleave(2, 1).mT * 0.25
    if fill is not None:
        x = x.masked_fill(~LATE, fill)
    p = x.softmax(-1)
    p = p.masked_fill((x == -math.inf).all(-1, keepdim=True), 0.0) if zero_rows else p
    return weigh(p, w) @ v.repeat_interleave(2, 1)


def operands(*more: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 63, 8), (2, 2, 129, 8), (2, 2, 129, 8), *more)
    return [torch.randn(s, generator=generator).double().requires_grad_() for s in shapes]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("fill", [None, -math.inf, -1e9, LOWEST])
@pytest.mark.parametrize("zero_rows", [False, True], ids=["nan", "zero"])
@pytest.mark.parametrize("way", ["dense", "tiled", "many tiles"])
def test_as_eager(name: str, fill: float | None, zero_rows: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "many tiles":
        monkeypatch.setattr(tiled, "KEYS", 40)
        monkeypatch.setattr(tiled, "ROWS", 16)
    weight, shape, weigh = WEIGHTS[name]
    q, k, v, w = operands(shape)
    do = torch.randn(2, 4, 63, 8, dtype=torch.float64)
    with force(way.split()[-1].replace("tiles", "tiled")):
        ours = fused(q, k, v, program=program(weight, shape, fill, zero_rows=zero_rows), captures=[w])
        found = torch.autograd.grad(ours, (q, k, v, w), do, allow_unused=True)
    exact = by_hand(q, k, v, w, fill, weigh, zero_rows)
    expected = torch.autograd.grad(exact, (q, k, v, w), do, allow_unused=True)
    for x, y in zip((ours, *found), (exact, *expected), strict=True):
        y = torch.zeros_like(w) if y is None else y
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("way", ["dense", "tiled"])
def test_rows_of_nan(way: str) -> None:
    """Of a row with a NaN or +inf in its scores, eager's softmax is NaN throughout; so is what a weight lets through, alone."""
    weight, shape, weigh = WEIGHTS["other"]
    q, k, v, w = operands(shape)
    q = q.detach()
    q[0, 0, 5], q[1, 3, 62, 0], q[0, 1, 7] = math.nan, math.inf, -math.inf
    for name in ("again", "other", "guard", "head"):
        weight, shape, weigh = WEIGHTS[name]
        w = torch.ones(shape, dtype=torch.float64)
        for fill in (None, -math.inf):
            with force(way):
                ours = fused(q, k, v, program=program(weight, shape, fill), captures=[w])
            torch.testing.assert_close(ours, by_hand(q, k, v, w, fill, weigh), rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("way", ["dense", "tiled"])
@pytest.mark.parametrize("name", ["table", "again", "both"])
def test_with_dropout(way: str, name: str) -> None:
    """Gradients agree with differences of the output under one mask."""
    weight, shape, _ = WEIGHTS[name]
    q, k, v, w = operands(shape)
    text = program(weight, shape, -1e9)
    inputs = [t.detach()[..., :5, :].clone() if t.dim() == 4 else t.detach() for t in (q, k, v)]
    if w.dim() > 1:
        w = w.detach()[..., :5] if name == "both" else w.detach()[:, :5, :5]
    wanted = [t.clone().requires_grad_() for t in (*inputs, w.detach())]

    def call(*tensors: Tensor) -> Tensor:
        *qkv, w = tensors
        return fused(*qkv, program=text, captures=[w], dropout_p=0.3, seed=torch.tensor(3))

    with force(way):
        assert torch.autograd.gradcheck(call, wanted, eps=1e-5, atol=1e-6)


def test_the_text_says_it() -> None:
    for weight, shape, _ in WEIGHTS.values():
        for sink in (None, load(0, "float", [const(0)] * len(shape))):
            given = program(weight, shape, LOWEST, sink=sink)
            assert parse(given.text) == given and parse(given.text).text == given.text
            assert given.with_root(SCORE).weight is weight
    assert Program(SCALED).text != Program(SCALED, weight=apply("neg", SCORE)).text


NOT_LINEAR = {
    "constant": const(1.0),
    "added": apply("add", SCORE, const(1.0)),
    "squared": apply("mul", SCORE, SCORE),
    "inverse": apply("div", const(1.0), SCORE),
    "threshold": apply("where", apply("gt", SCORE, const(0.1)), SCORE, ZERO),
    "floor": apply("where", apply("lt", K, Q), SCORE, const(1e-9)),
    "guard": apply("where", apply("isnan", SCORE), const(1e-9), SCORE),
    "int": K,
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_a_weight_may_be(name: str) -> None:
    with pytest.raises(ValueError, match=r"the weight of a score program is .*; needed: products and choices that are linear in"):
        Program(SCALED, weight=NOT_LINEAR[name])


def test_a_choice_beside_rows_with_infinities() -> None:
    weight = apply("where", SEES, SCORE, ZERO)
    assert Program(SCALED, weight=apply("neg", SCORE), inf_rows=True).selects is False
    with pytest.raises(ValueError, match=r"with inf_rows is where\(.*; needed: one without a choice"):
        Program(SCALED, weight=weight, inf_rows=True)


def test_atens_kernels_know_no_weight() -> None:
    q, weight = torch.randn(1, 2, 8, 16), apply("neg", SCORE)
    assert choose(q, q, q, [], Program(SCALED), 0.0, None) == "aten"
    assert choose(q, q, q, [], Program(SCALED, weight=weight), 0.0, None) == "tiled"
    assert not expresses(Program(SCALED, weight=weight))
