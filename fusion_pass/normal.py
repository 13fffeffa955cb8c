"""The normal form of a softmax: hand-written spellings become one ``softmax`` node, and what a softmax does not see goes.

Rules, each an identity of IEEE arithmetic too, up to rounding; c is the largest x_k of the row, a > 0 a number:

    exp(x_r) / sum_k exp(x_k)        = softmax(x)_r
    exp(x_r) * (1 / sum_k exp(x_k))  = softmax(x)_r
    exp(x_r - logsumexp_k(x_k))      = softmax(x)_r
    exp(log_softmax(x)_r)            = softmax(x)_r
    exp(x_r - c) / (n + sum_k exp(x_k - c))  = softmax(x)_r      0 < n: no more than half a unit in the last place of 1
    softmax(x - c)                   = softmax(x)
    softmax(a (x - c))               = softmax(a x)
    softmax(x - c + l)               = softmax(x + l)            l does not read the scores: a bias, or a mask of 0 and -inf

The exponentials may have masks for factors, or come from a softmax that is masked and divided by its sum again: see `exponents`.

The n above is added against a division by zero.  The sum has exp(0) among its terms, so that it is 1 at least: what is added is
lost to rounding in the dtype of the sum.  Where n is larger, or the sum can be smaller, nothing goes.

A softmax of which one column is no key, or whose sum has one more term, is one with a sink: see `sinks`.

The quotients and exp(x - logsumexp(x)), where values are not finite.  A row of -inf is 0 / 0 or -inf - -inf, and one NaN makes
the sum NaN: such rows are NaN throughout, as with softmax.  A row with +inf is not: it is NaN at that key, and 0 elsewhere, for
x / +inf and exp(x - +inf) are (`Program.inf_rows`).  After a shift it is, for the sum is NaN then.

The shift, where values are not finite.  A row of -inf has c = -inf, and x - c is NaN throughout: so is its softmax.  A row
with +inf or NaN has such a c; x - c is NaN at that place, and one NaN makes the whole row NaN.  With a < 0 it would not: a x
turns +inf into -inf, which a softmax takes for a masked key.  What is added after the shift leaves NaN where it is, and where x
is +inf: there x + l is +inf, or NaN.  (A choice after the shift could hide it.)

The shift, in the backward.  The gradient of a softmax with respect to its scores, ds = p (dp - sum_k p dp), sums to 0 over
the row.  c has -sum_k ds (times a) for its gradient, which is 0 whichever of several equal maxima it goes to, and whether c
was detached or not.

No other shift goes.  The mean of a row with a masked key is -inf, and any tensor may hold an infinity: x - c is NaN there,
the softmax of x is not.
"""

from __future__ import annotations

import math

import sympy
import torch
from fusion_kernels.program import Node, apply

from .describe import Describer, has_score
from .exponents import exponent_of
from .shifts import is_row_maximum
from .sinks import log_of, settled, with_sink

__all__ = ["as_softmax"]


def as_softmax(d: Describer, node: Node, position: sympy.Symbol) -> Node | None:
    """`node` as softmax; None where it is none.

    Its args are the scores over the bound axis, and a sink if there is one; its attr is axis, position, zero_rows, inf_rows.
    position: the axis of the keys, along which the probabilities are read.
    """
    if node.op == "narrowed":
        return None
    if node.op == "softmax":
        axis, place, zero_rows, _ = node.attr  # pyright: ignore[reportGeneralTypeIssues]
        if zero_rows:
            return node  # a row of -inf gives 0 there, and NaN once it is shifted
        return _softmax(d, node.args[0], axis, place, position)
    if node.op == "exp" and node.args[0].op == "log_softmax":
        axis, place, *_ = node.args[0].attr  # pyright: ignore
        return _softmax(d, node.args[0].args[0], axis, place, position)
    if node.op == "exp" and node.args[0].op == "sub" and node.args[0].args[1].op == "logsumexp":
        at, total = node.args[0].args
        return _matched(d, at, total.args[0], total.attr[0], position)  # pyright: ignore
    quotient = _quotient(node)
    if quotient is None:
        return None
    at, total = quotient
    total, rest = _sum_and_rest(total)
    above, below = exponent_of(d, at), exponent_of(d, total.args[0]) if total.op == "sum" else None
    if above is None or below is None or above.up_to_rows != below.up_to_rows:
        return None
    axis = total.attr[0]  # pyright: ignore
    if rest is None or _is_lost(d, rest, total, below.node, axis):
        return _matched(d, above.node, below.node, axis, position, inf_rows=not below.up_to_rows)
    sink = log_of(rest)
    if sink is None or below.up_to_rows or d.substitute(below.node, {axis: position}) is not above.node:
        return None
    return settled(d, below.node, *sink, axis, position, inf_rows=True)


def _quotient(node: Node) -> tuple[Node, Node] | None:
    if node.op == "div":
        return node.args[0], node.args[1]
    if node.op == "mul":
        for a, b in (node.args, node.args[::-1]):
            if b.op == "div" and b.args[0].op == "const" and b.args[0].attr == 1.0:
                return a, b.args[1]
    return None


def _sum_and_rest(total: Node) -> tuple[Node, Node | None]:
    """A sum over keys, and the term that is added to it."""
    if total.op == "add":
        for a, b in (total.args, total.args[::-1]):
            if a.op == "sum":
                return a, b
    return total, None


def _is_lost(d: Describer, rest: Node, total: Node, body: Node, axis: sympy.Symbol) -> bool:
    """Whether a number is lost to rounding when it is added to `total`, the sum of exp(body): one of them is exp(0)."""
    if rest.op != "const" or not (body.op == "sub" and is_row_maximum(d, body.args[1], body.args[0], axis)):
        return False
    units = [torch.finfo(value.dtype).eps for value, _ in d.held.get(total, ())]
    return bool(units) and 0 <= rest.attr <= min(units) / 4  # pyright: ignore[reportOperatorIssue]


def _matched(
    d: Describer, at: Node, body: Node, axis: sympy.Symbol, position: sympy.Symbol, *, inf_rows: bool = True
) -> Node | None:
    """softmax of `body` over `axis`, if `at` is `body` with the axis at `position`, or one further."""
    for place in (position, position + 1):
        if d.substitute(body, {axis: place}) is at:
            return _softmax(d, body, axis, place, position, inf_rows=inf_rows)
    return None


def _softmax(
    d: Describer, given: Node, axis: sympy.Symbol, place: sympy.Expr, position: sympy.Symbol, *, inf_rows: bool = False
) -> Node:
    """softmax of `given` over `axis`, read at `place`: with a sink, where one column is left out.

    inf_rows: whether its rows with +inf are those of a quotient.
    """
    body = _unshifted(d, given, axis)
    inf_rows &= body is given  # +inf - +inf is NaN before there is a quotient
    found = with_sink(d, body, axis, position, place, inf_rows=inf_rows)
    return found or Node.make("softmax", body, attr=(axis, place, False, inf_rows), kind="float")


def _unshifted(d: Describer, body: Node, axis: sympy.Symbol) -> Node:
    """`body` without the row maxima that are subtracted from it along `axis`."""
    if body.op == "sub" and is_row_maximum(d, body.args[1], body.args[0], axis):
        return _unshifted(d, body.args[0], axis)
    if body.op == "narrowed":
        inner = _unshifted(d, body.args[0], axis)
        return body if inner is body.args[0] else inner
    if body.op == "add":
        for x, added in (body.args, body.args[::-1]):
            inner = x if has_score(added) else _unshifted(d, x, axis)
            if inner is not x:
                return apply("add", inner, added)
    if body.op in ("mul", "div") and _is_positive(body.args[1]):
        inner = _unshifted(d, body.args[0], axis)
        return body if inner is body.args[0] else apply(body.op, inner, body.args[1])
    if body.op == "mul" and _is_positive(body.args[0]):
        inner = _unshifted(d, body.args[1], axis)
        return body if inner is body.args[1] else apply("mul", body.args[0], inner)
    return body


def _is_positive(node: Node) -> bool:
    return node.op == "const" and 0 < node.attr < math.inf  # pyright: ignore[reportOperatorIssue]
