"""Dropout of the probabilities: its spellings, and whether the op may draw the mask in their place.

The op draws one bit for each (b, h, q, k). That is what the code means where each probability has an element of the mask of
its own, and where nothing else reads the mask: not the caller, and no second attention but one that reads each bit where the
first does, and then has its seed (`Bits`). Spellings, with keep = 1 - p and n a draw:

    dropout(x)                            native_dropout, in place or not
    x * dropout(1)                        a mask of its own, made by dropout
    x * (n / keep),  x * n / keep         n one with probability keep, else 0: what dropout in place comes to
"""

# sympy is not typed
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalSubscript=false
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from fusion_kernels.program import Node

from .describe import Describer
from .indexing import Div, Mod, coefficient, expr_of, same
from .site import Reason, Refused
from .tape import Record

__all__ = ["Bits", "Draw", "as_dropout", "own_bits"]


@dataclass(frozen=True)
class Draw:
    """One dropout: its rate, the call that draws the mask, and where a probability reads it."""

    p: float
    record: Record
    index: tuple[sympy.Expr, ...]


@dataclass(frozen=True)
class Bits:
    """Which bit of a mask each probability reads; equal ones are the same bit at the same place of the op.

    The op's own bits are a function of (seed, r, q, k) with r = b * H + h, whatever axes r merges. So is this: the bits of the
    mask are counted in row-major order, and bit

        start + along_query q + along_key k + sum_i stride_i r_i

    is read, where the r_i are r in the radices of `rows`, (size, stride) each, the first the outermost. Where one stride is
    the next one's times its size, the two are one: q of [4, 2, N, D] heads and q of [2, 4, N, D] read a mask alike.
    """

    p: float
    record: Record
    start: sympy.Expr
    along_query: sympy.Expr
    along_key: sympy.Expr
    rows: tuple[tuple[sympy.Expr, sympy.Expr], ...]


def as_dropout(d: Describer, node: Node) -> tuple[Draw, Node] | None:
    """The draw and what it is applied to, if `node` is a dropout in some spelling."""
    if node.op == "dropout":
        return _draw(d, node), node.args[0]
    if node.op == "div" and node.args[0].op == "mul":  # x * n / keep
        for x, noise in (node.args[0].args, node.args[0].args[::-1]):
            if _keeps(noise, node.args[1]):
                return _draw(d, _unrounded(noise)), x
    if node.op != "mul":
        return None
    for x, noise in (node.args, node.args[::-1]):
        noise = _unrounded(noise)
        if noise.op == "dropout" and noise.args[0].op == "const" and noise.args[0].attr == 1.0:
            return _draw(d, noise), x
        if noise.op == "div" and _keeps(noise.args[0], noise.args[1]):
            return _draw(d, _unrounded(noise.args[0])), x
    return None


def _unrounded(node: Node) -> Node:
    while node.op.startswith("round_"):
        node = node.args[0]
    return node


def _keeps(noise: Node, keep: Node) -> bool:
    """Whether `noise` is 1 with the probability `keep`."""
    noise = _unrounded(noise)
    return noise.op == "bernoulli" and keep.op == "const" and abs(noise.attr[0] - keep.attr) < 1e-6


def _draw(d: Describer, node: Node) -> Draw:
    rate, seq, index = node.attr
    record = next(r for r in d.shadow.records if r.seq == seq)
    return Draw(1.0 - rate if node.op == "bernoulli" else rate, record, index)


def own_bits(d: Describer, draw: Draw, heads: Sequence[sympy.Symbol], query: sympy.Symbol, key: sympy.Symbol) -> Bits:
    """The bits that the probabilities read, each one of its own. heads: the axes of the batch and the heads, outermost first.

    Raises:
        Refused: (DROPOUT) one bit of the mask is read for several probabilities.
    """
    heads = [a for a in heads if d.axes.sizes[a] != 1]
    wanted = {*heads, *(a for a in (query, key) if d.axes.sizes[a] != 1)}
    read = {a for e in draw.index for a in d.axes.of(e)}
    shape = tuple(map(expr_of, draw.record.outputs[0].shape))
    if wanted <= read and not any(e.has(Div, Mod) for e in draw.index):
        zero: dict[sympy.Symbol, sympy.Expr] = dict.fromkeys(read, sympy.S.Zero)
        position = sympy.expand(sum((e * math.prod(shape[i + 1 :]) for i, e in enumerate(draw.index)), sympy.S.Zero))
        stride = {a: coefficient(position, a) if d.axes.sizes[a] != 1 else sympy.S.Zero for a in (*heads, query, key)}
        rows = _radices([(d.axes.sizes[a], stride[a]) for a in heads])
        return Bits(draw.p, draw.record, sympy.expand(position.xreplace(zero)), stride[query], stride[key], rows)
    raise Refused(
        Reason.DROPOUT, f"a mask of shape {shape} is shared by several of them", "dropout of every probability by itself"
    )


def _radices(axes: Sequence[tuple[sympy.Expr, sympy.Expr]]) -> tuple[tuple[sympy.Expr, sympy.Expr], ...]:
    """(size, stride) of each axis, the outermost first, where axes that step on in each other's stride are merged."""
    merged: list[tuple[sympy.Expr, sympy.Expr]] = []
    for size, stride in axes:
        if merged and same(merged[-1][1], size * stride):
            size *= merged.pop()[0]
        merged.append((sympy.expand(size), sympy.expand(stride)))
    return tuple(merged)
