"""Attention sinks: a column that takes part in the softmax and is left out of the product with the values.

With x the scores over the keys and z a score without a key, rules as identities of IEEE arithmetic up to rounding:

    softmax([x, z])_r = softmax([z, x])_(1+r)  = exp(x_r) / (exp(z) + sum_k exp(x_k))     the softmax of x with the sink z
    exp(x_r) / (n + sum_k exp(x_k))            the sink log(n), n > 0 a number
    exp(x_r) / (n exp(z) + sum_k exp(x_k))     the sink z + log(n)
    softmax(x - c; z - c)                      = softmax(x; z), for a row's c = max(z, max_k x_k) or c = max_k x_k

The shift, where values are not finite.  With c the largest of all, a row of -inf is NaN only if z is -inf as well, before the
shift as after it.  With c the largest x alone, a row of -inf is NaN whatever z is, for -inf - -inf is: then the program has no
`zero_rows`.  +inf and NaN make a row NaN in both forms; without a
shift, the quotients have +inf as they have it without a sink (see `normal`).

The shift, in the backward.  ds sums to 0 over a row with its sink, so that c has no gradient (see `normal`).
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false
from __future__ import annotations

import math

import sympy
from fusion_kernels.program import Node, apply, const, postorder

from .describe import Describer, symbols_of
from .indexing import same
from .kinds import has_score
from .pointwise import clamped
from .shifts import is_row_maximum

__all__ = ["log_of", "settled", "with_sink"]


def with_sink(
    d: Describer, body: Node, axis: sympy.Symbol, key: sympy.Symbol, place: sympy.Expr, *, inf_rows: bool
) -> Node | None:
    """softmax of `body` over `axis`, of which all columns but one are keys, as one over the keys with that column for a sink.

    key: the axis of the keys, along which the probabilities are read at `place`. inf_rows: as in `Program`, unless x is shifted.
    None where it is no such softmax.
    """
    keys = d.axes.sizes[key]
    first = sympy.expand(place - key) if key in place.free_symbols else place if keys == 1 else None
    if first not in (0, 1) or not same(d.axes.sizes[axis], keys + 1):
        return None
    column = keys if first == 0 else sympy.S.Zero
    kept = d.kept_axis(axis, key)
    scores, sink = (d.substitute(body, {axis: at}) for at in (kept + first, column))
    return settled(d, scores, sink, 0.0, kept, key, inf_rows=inf_rows)


def settled(
    d: Describer, body: Node, sink: Node, more: float, axis: sympy.Symbol, position: sympy.Expr, *, inf_rows: bool
) -> Node | None:
    """softmax(body; sink + more), without the row maxima subtracted from both; None where they are subtracted from one alone."""
    zero_rows = True
    while (parts := _difference(body)) is not None and (other := _difference(sink)) is not None and parts[1] is other[1]:
        shift = d.beyond(parts[1])
        largest = next((n for n in postorder(shift) if is_row_maximum(d, n, parts[0], axis)), None)
        if largest is None or (shift is not largest and (more or shift not in _larger(largest, other[0]))):
            break
        zero_rows &= shift is not largest
        body, sink, inf_rows = parts[0], other[0], False
    if any(n.op == "amax" and has_score(n) for n in postorder(body, sink)) or position in symbols_of(sink):
        return None
    sink = apply("add", sink, const(more)) if more else sink
    return Node.make("softmax", body, sink, attr=(axis, position, zero_rows, inf_rows), kind="float")


def _difference(node: Node) -> tuple[Node, Node] | None:
    while node.op == "narrowed":
        node = node.args[0]
    if node.op == "neg":
        return const(0.0), node.args[0]
    return node.args if node.op == "sub" else None  # pyright: ignore[reportReturnType]


def _larger(a: Node, b: Node) -> tuple[Node, ...]:
    """The larger of a row maximum and a sink, as it may be written."""
    return apply("maximum", a, b), apply("maximum", b, a), clamped(a, b, None)


def log_of(rest: Node) -> tuple[Node, float] | None:
    """(z, log n) of a term n exp(z) of the sum, or None."""
    if rest.op == "const" and 0 < rest.attr < math.inf:
        return const(math.log(rest.attr)), 0.0
    if rest.op == "exp":
        return rest.args[0], 0.0
    if rest.op == "mul":
        for n, e in (rest.args, rest.args[::-1]):
            if n.op == "const" and 0 < n.attr < math.inf and e.op == "exp":
                return e.args[0], math.log(n.attr)
    return None
