"""Exponentials that a hand-written softmax sums: each as exp of one expression, the masks among its factors included.

Rules, with x any expression, c a condition and y the scores of a softmax over the keys:

    exp(x)                     exponent x
    exp(x) * float(c)          exponent x + where(c, 0, -inf)
    softmax(y)_k               exponent y_k, less a number of the row

They are identities of IEEE arithmetic up to rounding, as exp(-inf) is 0: a product with 0 is NaN where exp(x) is infinite or NaN,
and so is x + -inf, in the backward too.  A mask that is a tensor of floats is no condition: it may hold any number.

There is no rule for where(c, exp(x), 0).  It is exp(where(c, x, -inf)), but for the gradient of x where c hides an infinity: that
is 0 times exp(x), NaN, where the choice of an exponent has 0.

The number of the row cancels in a quotient by the sum.  Where exp(x) overflows, or all that is left of a row underflows,
eager has no number and float64 has one: so has the op, which subtracts the largest exponent first.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import math
from dataclasses import dataclass

from fusion_kernels.program import Node, apply, const

from .describe import Describer

__all__ = ["Exponent", "exponent_of"]

ZERO, ONE, NEVER = const(0.0), const(1.0), const(-math.inf)


@dataclass(frozen=True)
class Exponent:
    """`node`, of which a value is the exponential. up_to_rows: but for a number of each row, finite or NaN for all keys."""

    node: Node
    up_to_rows: bool = False


def exponent_of(d: Describer, node: Node) -> Exponent | None:
    """The exponent of a value; None where it is no exponential by the rules above."""
    if node.op == "exp":
        return Exponent(node.args[0])
    if node.op == "softmax" and len(node.args) == 1:
        axis, place, zero_rows, _ = node.attr
        return None if zero_rows else Exponent(d.substitute(node.args[0], {axis: place}), up_to_rows=True)
    if node.op == "mul":
        for factor, x in (node.args, node.args[::-1]):
            kept = _condition(factor)
            found = exponent_of(d, x) if kept is not None else None
            if found is not None:
                return Exponent(apply("add", found.node, apply("where", kept, ZERO, NEVER)), found.up_to_rows)
    return None


def _condition(factor: Node) -> Node | None:
    """The condition under which a factor is 1; it is 0 elsewhere."""
    while factor.op.startswith("round_"):
        factor = factor.args[0]
    if factor.op == "to_float" and factor.args[0].kind == "bool":
        return factor.args[0]
    if factor.op == "where" and factor.args[1:] in ((ONE, ZERO), (ZERO, ONE)):
        return factor.args[0] if factor.args[1] is ONE else apply("not", factor.args[0])
    if factor.op == "mul":
        both = [_condition(a) for a in factor.args]
        return None if None in both else apply("and", *both)
    return None
