"""The normal form of a softmax: hand-written spellings become one ``softmax`` node.

Rules, each an identity of IEEE arithmetic too, up to rounding; c is the largest x_k of the row. Any other shift stays in the
scores: where it is -inf or NaN (the mean of a masked row), x - c is NaN and the softmax of x is not.

    exp(x_r - c) / sum_k exp(x_k - c)        = softmax(x)_r
    exp(x_r - c) * (1 / sum_k exp(x_k - c))  = softmax(x)_r
    exp(x_r - logsumexp_k(x_k))              = softmax(x)_r
    exp(log_softmax(x)_r)                    = softmax(x)_r
"""

from __future__ import annotations

import sympy
from fusion_kernels.program import Node

from .describe import DETACHING, Describer

__all__ = ["as_softmax"]


def as_softmax(d: Describer, node: Node, position: sympy.Symbol) -> Node | None:
    """`node` as softmax (arg: the scores over the bound axis; attr: axis, position, zero_rows), or None where it is no softmax.

    position: the axis along which the probabilities are read.
    """
    if node.op == "narrowed":
        return None
    if node.op == "softmax":
        return node
    if node.op == "exp" and node.args[0].op == "log_softmax":
        inner = node.args[0]
        return Node.make("softmax", *inner.args, attr=inner.attr, kind="float")
    if node.op == "exp" and node.args[0].op == "sub" and node.args[0].args[1].op == "logsumexp":
        at, total = node.args[0].args
        return _matched(d, at, total.args[0], total.attr[0], position)  # pyright: ignore
    quotient = _quotient(node)
    if quotient is None:
        return None
    at, total = quotient
    if at.op != "exp" or total.op != "sum" or total.args[0].op != "exp":
        return None
    return _matched(d, at.args[0], total.args[0].args[0], total.attr[0], position)  # pyright: ignore


def _quotient(node: Node) -> tuple[Node, Node] | None:
    if node.op == "div":
        return node.args[0], node.args[1]
    if node.op == "mul":
        for a, b in (node.args, node.args[::-1]):
            if b.op == "div" and b.args[0].op == "const" and b.args[0].attr == 1.0:
                return a, b.args[1]
    return None


def _matched(d: Describer, at: Node, body: Node, axis: sympy.Symbol, position: sympy.Symbol) -> Node | None:
    """softmax of `body` over `axis`, if `at` is `body` with the axis at `position`."""
    if d.substitute(body, {axis: position}) is not at:
        return None
    while body.op == "sub" and _is_row_maximum(d, body.args[1], body.args[0], axis):
        body = body.args[0]  # softmax(x - max x) = softmax(x), in rows of -inf, with +inf and with NaN as well
    return Node.make("softmax", body, attr=(axis, position, False), kind="float")


def _is_row_maximum(d: Describer, node: Node, body: Node, axis: sympy.Symbol) -> bool:
    """Whether `node` is the largest value of `body` along `axis`, detached or not: the softmax's gradient sums to zero."""
    while node.op == "value":
        value, index = d.shadow.values[node.attr[0]], node.attr[1]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        if value.record is None or value.record.op not in DETACHING:
            return False
        node = d.element(value.record.args[0], index)
    if node.op != "amax":
        return False
    return d.substitute(node.args[0], {node.attr[0]: axis}) is body  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
