"""Anchors: which softmaxes of a graph may be attention, before anything is described.

A softmax is one if its result, at its full size (or without one column, see `sinks`) and through any calls, reaches a
product of matrices.  What the calls between them do is for `match` to judge; here a softmax only must not be overlooked.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from dataclasses import dataclass

import sympy

from .describe import PRODUCTS
from .indexing import expr_of, same
from .tape import Record, Shadow, Value

__all__ = ["Anchor", "find_anchors", "reaches_product"]

MAX_REACH = 400  # calls between a softmax and its product with values


@dataclass(frozen=True)
class Anchor:
    """A softmax (or the sum of a hand-written one) and the product that it reaches."""

    record: Record  # the softmax
    product: Record  # bmm or mm with the probabilities as one factor
    side: int  # 0: probabilities @ values, 1: values^T @ probabilities^T


def find_anchors(shadow: Shadow) -> list[Anchor]:
    """Every softmax whose result, at its full size, reaches a product."""
    users = shadow.readers
    anchors = []
    for record in shadow.records:
        if not _is_softmax(record):
            continue
        start = record.outputs[0] if record.op.endswith("_softmax.default") else record.args[0]
        found = reaches_product(users, start)
        if found is not None:
            anchors.append(Anchor(record, *found))
    anchors.sort(key=lambda a: a.record.op == "logsumexp.default")  # of the scores, beside their softmax
    taken: set[tuple[int, int]] = set()
    found = [a for a in anchors if (a.product.seq, a.side) not in taken and not taken.add((a.product.seq, a.side))]
    return sorted(found, key=lambda a: a.record.seq)


def _is_softmax(record: Record) -> bool:
    if record.op in ("_softmax.default", "_safe_softmax.default"):
        return True
    if record.op in ("_log_softmax.default", "logsumexp.default"):
        return True
    if record.op != "sum.dim_IntList" or not isinstance(record.args[0], Value):
        return False
    source = record.args[0].record
    return source is not None and source.op == "exp.default"


def reaches_product(users: dict[Value, list[Record | Value]], start: Value) -> tuple[Record, int] | None:
    """The first product that reads a value of the size of `start`, or without one of its columns, made from it."""
    todo, seen = [start], {start}
    while todo and len(seen) < MAX_REACH:
        value = todo.pop(0)
        for record in users.get(value, ()):
            if isinstance(record, Value):
                todo.append(record)
                seen.add(record)
                continue
            if record.op in PRODUCTS:
                first = PRODUCTS[record.op]
                if value in record.args[first : first + 2]:
                    return record, record.args[first : first + 2].index(value)
                continue
            for out in record.outputs:
                if out not in seen and (same(_size(out), _size(value)) or _shorter_by_one(record, value, out)):
                    seen.add(out)
                    todo.append(out)
    return None


def _size(value: Value) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*map(expr_of, value.shape)))


def _shorter_by_one(record: Record, value: Value, out: Value) -> bool:
    """Whether a call leaves out the first or the last element of one dim."""
    if record.op not in ("slice.Tensor", "split.Tensor", "split_with_sizes.default"):
        return False
    less = [expr_of(a) - expr_of(b) for a, b in zip(value.shape, out.shape, strict=True) if not same(expr_of(a), expr_of(b))]
    return len(less) == 1 and same(less[0], sympy.S.One)
