"""Sinks in torch: the reference and its tiled form beside a softmax with one more column, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fusion_kernels import attention
from fusion_kernels.choice import choose, force
from fusion_kernels.cudnn import expresses
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, parse
from torch import Tensor

B_, H_, Q, K = (index(n) for n in "bhqk")
SCALED = apply("mul", SCORE, const(0.25))
LOWEST = torch.finfo(torch.float32).min
SINKS = {
    "head": (load(0, "float", [H_]), (4,)),
    "row": (load(0, "float", [B_, H_, Q]), (2, 4, 63)),
    "one": (load(0, "float", []), ()),
    "twice": (apply("add", load(0, "float", [H_]), apply("mul", load(0, "float", [const(0)]), const(3.0))), (4,)),
}


def fused(*operands: Tensor, **arguments: Any) -> Tensor:
    out = attention(*operands, **arguments)
    assert isinstance(out, Tensor)
    return out


def program(sink: Node, rank: int, fill: float | None, zero_rows: bool = True) -> Program:
    root = SCALED if fill is None else apply("where", apply("lt", K, Q), SCALED, const(fill))  # query 0 sees no key
    return Program(root, (Capture("float", rank),), zero_rows=zero_rows, sink=sink)


def by_hand(q: Tensor, k: Tensor, v: Tensor, z: Tensor, fill: float | None, zero_rows: bool, name: str) -> Tensor:
    x = q @ k.repeat_interleave(2, 1).mT * 0.25
    if fill is not None:
        x = x.masked_fill(torch.arange(k.shape[2]) >= torch.arange(q.shape[2])[:, None], fill)
    if not zero_rows:  # the shift of a softmax that is written by hand: -inf - -inf
        x = x + torch.where((x == -math.inf).all(-1, keepdim=True), math.nan, 0.0)
    z = z + 3 * z[0] if name == "twice" else z
    z = z.view(1, 4, 1, 1) if name in ("head", "twice") else z.unsqueeze(-1) if name == "row" else z
    return torch.cat([x, z.expand(*x.shape[:3], 1)], -1).softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("fill", [None, -math.inf, -1e9, LOWEST])
@pytest.mark.parametrize("zero_rows", [True, False], ids=["zero", "nan"])
@pytest.mark.parametrize("low", [0.0, -math.inf, -1e9], ids=["usual", "none", "deep"])
@pytest.mark.parametrize("way", ["dense", "tiled"])
def test_one_more_column(name: str, fill: float | None, zero_rows: bool, low: float, way: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(2, h, n, 8, generator=generator).double() for h, n in ((4, 63), (2, 129), (2, 129), (4, 63)))
    sink, shape = SINKS[name]
    z = torch.randn(shape, generator=generator).double()
    z = torch.where(torch.arange(z.numel()).view(shape) % 3 == 1, z + low, z)
    wanted = [t.requires_grad_() for t in (q, k, v, z)]
    with force(way):
        ours = fused(q, k, v, program=program(sink, z.dim(), fill, zero_rows), captures=[z])
        gradients = torch.autograd.grad(ours, wanted, do)
    exact = by_hand(q, k, v, z, fill, zero_rows, name)
    for found, expected in zip((ours, *gradients), (exact, *torch.autograd.grad(exact, wanted, do)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_the_argument() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 63, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    for shape in ((4, 1), (2, 4, 63), (1,), ()):
        z = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        ours = fused(q, k, v, scale=0.25, causal=True, sink=z)
        x = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~torch.ones(63, 63).tril().bool(), -math.inf)
        column = z.expand(2, 4, 63).unsqueeze(-1)
        exact = torch.cat([x, column], -1).softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
        (a,), (b,) = (torch.autograd.grad(out.square().sum(), z) for out in (ours, exact))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    hidden = fused(q, k, v, mask=torch.zeros(63, 63, dtype=torch.bool), sink=torch.zeros(4, 1, dtype=torch.float64))
    assert not hidden.any()


def test_bad_arguments() -> None:
    q = torch.randn(2, 4, 63, 8)
    with pytest.raises(ValueError, match=r"sink has shape \(4,\); needed: broadcastable to \(2, 4, 63\) \(B, H, N\)"):
        attention(q, q, q, sink=torch.zeros(4))
    with pytest.raises(ValueError, match=r"sink has dtype torch\.int64; needed: floating point"):
        attention(q, q, q, sink=torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="program was passed with sink"):
        attention(q, q, q, sink=torch.zeros(4, 1), program=Program(SCALED))


def test_no_keys() -> None:
    z = torch.zeros(2, requires_grad=True)
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 0, 8)
    out = fused(q, k, k, program=Program(SCALED, (Capture("float", 1),), sink=load(0, "float", [H_])), captures=[z])
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, z)))


def test_the_text_says_it() -> None:
    for sink, _ in SINKS.values():
        for zero_rows in (True, False):
            given = program(sink, 2, LOWEST, zero_rows)
            assert parse(given.text) == given and parse(given.text).text == given.text
            assert given.with_root(SCORE).sink is sink
    same = Program(const(0.0), sink=const(0.0))  # the sink is the score, as an expression
    assert parse(same.text) == same
    assert Program(SCALED).text != Program(SCALED, sink=const(0.0)).text


@pytest.mark.parametrize("sink", [SCORE, apply("to_float", K), const(1)], ids=["score", "keys", "int"])
def test_what_a_sink_may_read(sink: Node) -> None:
    with pytest.raises(ValueError, match=r"the sink of a score program is .*; needed: a float of b, h, q and captures"):
        Program(SCALED, sink=sink)


def test_atens_kernels_know_no_sink() -> None:
    q = torch.randn(1, 2, 8, 16)
    assert choose(q, q, q, [], Program(SCALED), 0.0, None) == "aten"
    assert choose(q, q, q, [], Program(SCALED, sink=const(0.0)), 0.0, None) == "tiled"
    assert not expresses(Program(SCALED, sink=const(0.0)))
