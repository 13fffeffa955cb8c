"""Symbolic sizes: what guards make equal is one size to the pass, one graph serves many lengths, and no guard is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from checks import Recorder, assert_rule, exactly, fused_nodes, run, sites_text
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.functions import FloorDiv

import fusion_pass
from fusion_pass.indexing import expr_of, same
from fusion_pass.sizes import sizes_of

LENGTHS = (33, 64, 129)

# ---------------------------------------------------------------- models: heads and head dims symbolic on one side or on both


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def head_dim_by_division(x: Tensor, h: int = 4) -> Tensor:
    b, n, _ = x.shape
    d = x.shape[-1] // h
    q = x.view(b, n, h, d).transpose(1, 2)
    return attend(q, q.flip(2), q).transpose(1, 2).reshape(b, n, h * d)


def heads_of_inputs(x: Tensor, y: Tensor) -> Tensor:
    """Four heads by a view of x, four by the shape of y: ``s1 // 4 == s2`` is left as a guard."""
    b, n, e = x.shape
    return attend(x.view(b, n, 4, e // 4).transpose(1, 2), y, y)


def projected(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, h: int = 4, kv: int = 2) -> Tensor:
    """Weights as inputs, so that their sizes are symbols; grouped heads."""
    b, n, _ = x.shape
    q = (x @ wq).view(b, n, h, -1).transpose(1, 2)
    k, v = ((x @ w).view(b, n, kv, -1).transpose(1, 2).repeat_interleave(h // kv, 1) for w in (wk, wv))
    return attend(q, k, v).transpose(1, 2).flatten(2)


def repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    kv = k.shape[1]
    k, v = (t[:, :, None].expand(b, kv, h // kv, n, d).reshape(b, h, n, d) for t in (k, v))
    return attend(q, k, v)


def chunks(x: Tensor) -> Tensor:
    """``chunk`` gives sizes ``(s + 2) // 3`` and ``s - 2 * ((s + 2) // 3)``, which the views make equal."""
    q, k, v = (t.reshape(2, -1, 3, 8).transpose(1, 2) for t in x.chunk(3, dim=-1))
    return attend(q, k, v)


def batch_of_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(B H, N, D) with a mask of (B, M): the number of heads is a quotient of two sizes."""
    n = q.shape[1]
    scores = torch.bmm(q, k.mT).view(mask.shape[0], -1, n, n) + mask[:, None, None]
    return scores.view(-1, n, n).softmax(-1) @ v


def attention_weights_of_linear(x: Tensor, w: Tensor, h: int = 4) -> Tensor:
    b, n, _ = x.shape
    q, k, v = F.linear(x, w).view(b, n, 3, h, -1).unbind(2)
    return attend(*(t.transpose(1, 2) for t in (q, k, v)))


def _normal(*shapes: tuple[int, ...]) -> Callable[[int], list[Tensor]]:
    """0 stands for the length."""

    def make(length: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(length)
        return [torch.randn([n or length for n in s], generator=generator).requires_grad_() for s in shapes]

    return make


MODELS: dict[Callable[..., Tensor], Callable[[int], list[Tensor]]] = {
    head_dim_by_division: _normal((2, 0, 32)),
    heads_of_inputs: _normal((2, 0, 32), (2, 4, 17, 8)),
    projected: _normal((2, 0, 24), (24, 32), (24, 16), (24, 16)),
    repeat_kv: _normal((2, 4, 0, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
    chunks: _normal((2, 0, 72)),
    batch_of_the_mask: _normal((8, 0, 5), (8, 0, 5), (8, 0, 5), (2, 0)),
    attention_weights_of_linear: _normal((2, 0, 24), (96, 24)),
}


@pytest.mark.parametrize("fn", MODELS, ids=lambda f: f.__name__)
def test_one_graph_for_many_lengths(fn: Callable[..., Tensor]) -> None:
    """As many graphs as without the pass, each fused, and right at every length."""
    plain, fused = Recorder("eager"), Recorder("eager")
    compiled = [
        torch.compile(fn, backend=backend, dynamic=True, fullgraph=True)
        for backend in (plain, fusion_pass.make_backend(inner=fused, when="always"))
    ]
    for call in compiled:
        torch._dynamo.reset()
        for length in LENGTHS:
            inputs = MODELS[fn](length)
            assert_rule(run(call, inputs), run(fn, inputs), exactly(fn, inputs), f"{fn.__name__} of {length}")
    report = fusion_pass.last_report()
    assert len(report.fused) == 1 and not report.refused, sites_text(report)
    assert len(fused.graphs) == len(plain.graphs) == fused_nodes(fused.graphs), (len(fused.graphs), len(plain.graphs))


# ---------------------------------------------------------------- the algebra


def env(*hints: int) -> tuple[ShapeEnv, list[Any]]:
    shape_env = ShapeEnv()
    made = []
    for i, hint in enumerate(hints):
        source = ConstantSource(f"size{i}")
        symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        made.append(shape_env.create_symintnode(symbol, hint=hint, source=source))
    return shape_env, made


def test_exact_division() -> None:
    """``e % h == 0`` makes ``e // h`` a size t with ``e == h * t``."""
    shape_env, (e, h) = env(32, 4)
    assert not same(expr_of(e), expr_of(h * (e // h)))
    assert e % h == 0
    assert same(expr_of(e), expr_of(h * (e // h)))
    assert same(expr_of(e * 3 // h), expr_of(3 * (e // h)))
    quotient = expr_of(e // h)
    assert quotient.is_Symbol
    assert sizes_of(shape_env).plain(quotient) == FloorDiv(e.node.expr, h.node.expr)
    assert sizes_of(shape_env).plain(expr_of(e)) == e.node.expr


def test_quotients_made_equal() -> None:
    """The head dims of q and k, ``s0 // 4`` and ``s1 // s2``."""
    _, (a, b, g) = env(32, 16, 2)
    assert a % 4 == 0 and b % g == 0
    assert not same(expr_of(a // 4), expr_of(b // g))
    assert a // 4 == b // g
    assert same(expr_of(a // 4), expr_of(b // g))
    assert same(expr_of(a * g), expr_of(4 * b))


def test_equal_by_chance() -> None:
    """Two sizes of the same value that nothing has compared are two sizes."""
    shape_env, (a, b) = env(36, 18)
    assert a > b
    assert not same(expr_of(a), expr_of(2 * b))
    assert len(shape_env.guards) == 1


def test_unequal_is_not_equal() -> None:
    _, (a, b) = env(36, 18)
    assert a != b and a % b != 1
    assert not same(expr_of(a), expr_of(b))


def test_a_factor_that_may_be_zero_is_not_cancelled() -> None:
    """``z a == z b`` says nothing about a and b where z may be 0."""
    shape_env = ShapeEnv()
    z, a, b = sympy.symbols("z a b", integer=True)
    sizes = sizes_of(shape_env)
    sizes._solve([z * a - z * b])
    assert not sizes.solved
    sizes.positive.add(z)
    sizes._solve(sizes.unsolved)
    assert sizes.solved == {a: b} or sizes.solved == {b: a}


def test_a_third_with_a_rest_is_no_size() -> None:
    """``(s + 2) // 3`` is not ``s / 3 + 2 / 3``."""
    _, (s,) = env(37)
    assert expr_of((s + 2) // 3).has(FloorDiv)


def test_reading_adds_no_guard() -> None:
    shape_env, (e, h) = env(32, 4)
    assert e % h == 0
    before = len(shape_env.guards)
    for size in (e, h, e // h, e * h, (e + 2) // 3):
        expr_of(size)
    assert len(shape_env.guards) == before
