"""Anchors: which softmaxes of a graph may be attention, before anything is described.

A softmax is one if its result, at its full size (or without one column, see `sinks`; or at one index of a dim) and through any
calls, reaches a product of matrices.  What the calls between them do is for `match` to judge; here a softmax only must not be
overlooked.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import sympy

from .describe import PRODUCTS
from .indexing import expr_of, same
from .tape import Record, Shadow, Value
from .views import VIEWS

__all__ = ["Anchor", "find_anchors", "reaches_product"]

MAX_REACH = 400  # calls between a softmax and its product with values
MAX_EDITS = 12  # calls between an exponential and the sum over keys, and between the sum and the quotient
MAX_PRODUCTS = 8  # of one softmax that are looked at: a further one reads the probabilities, as anything may

EDITS = frozenset({"mul.Tensor", "mul.Scalar", "where.self", "masked_fill.Scalar", "masked_fill.Tensor", "_to_copy.default"})


_PARTS = frozenset({"select.int", "unbind.int"})  # of maps that belong together, as those of differential attention


@dataclass(frozen=True)
class Anchor:
    """A softmax (or the sum of a hand-written one) and the product that it reaches."""

    record: Record  # the softmax
    product: Record  # bmm or mm with the probabilities as one factor
    side: int  # 0: probabilities @ values, 1: values^T @ probabilities^T
    first: Anchor | None = None  # the same softmax with the product that is nearest to it, where this is another one


def find_anchors(shadow: Shadow) -> list[Anchor]:
    """Every softmax whose result, at its full size, reaches a product; those that reach several, once for each."""
    users = shadow.readers
    anchors, further = [], {}
    for record in shadow.records:
        if not _is_softmax(record):
            continue
        if record.op == "sum.dim_IntList":  # of the numbers that are divided by it, or of others made in the same way
            direct = [record.args[0]] if _is_exponential(record.args[0]) else []
            starts = [*direct, *_quotients(users, record)]
        else:
            starts = [record.outputs[0] if record.op.endswith("_softmax.default") else record.args[0]]
        products = list(islice(_products(users, *starts), MAX_PRODUCTS))
        if products:
            anchors.append(anchor := Anchor(record, *products[0]))
            further[anchor] = [Anchor(record, *found, anchor) for found in products[1:]]
    anchors.sort(key=lambda a: a.record.op == "logsumexp.default")  # of the scores, beside their softmax
    taken: set[tuple[int, int]] = set()
    found: list[Anchor] = []
    for group in (anchors, [b for a in anchors for b in further[a]]):
        found += [a for a in group if (a.product.seq, a.side) not in taken and not taken.add((a.product.seq, a.side))]
    return sorted(found, key=lambda a: a.record.seq)


def _is_softmax(record: Record) -> bool:
    if record.op in ("_softmax.default", "_safe_softmax.default"):
        return True
    if record.op in ("_log_softmax.default", "logsumexp.default"):
        return True
    if record.op != "sum.dim_IntList" or not isinstance(record.args[0], Value):
        return False
    return _of_exponentials(record.args[0])


def _is_exponential(value: Value) -> bool:
    return value.record is not None and value.record.op == "exp.default"


def _of_exponentials(value: Value) -> bool:
    """Whether a value is an exponential, or a few masks and factors away from one."""
    todo, looked_at = [value], 0
    while todo and looked_at < MAX_EDITS:
        value, looked_at = todo.pop(0), looked_at + 1
        if _is_exponential(value):
            return True
        if value.record is not None and (value.record.op in EDITS or value.record.op in VIEWS):
            todo += value.record.inputs
    return False


def _quotients(users: dict[Value, list[Record | Value]], total: Record) -> Iterator[Value]:
    """What is divided by a sum, or multiplied by its inverse: results of the size of what was summed."""
    full, small = _size(total.args[0]), _size(total.outputs[0])
    todo, seen = [(total.outputs[0], False)], {total.outputs[0]}
    while todo and len(seen) < MAX_EDITS:
        value, inverse = todo.pop(0)
        for record in users.get(value, ()):
            if isinstance(record, Value) or len(record.outputs) != 1:
                continue
            (out,) = record.outputs
            divides = record.op == "div.Tensor" and record.args[1] is value
            if same(_size(out), small) and out not in seen:
                seen.add(out)
                todo.append((out, inverse or divides or record.op == "reciprocal.default"))
            elif (divides or (inverse and record.op == "mul.Tensor")) and same(_size(out), full):
                yield out


def reaches_product(users: dict[Value, list[Record | Value]], start: Value) -> tuple[Record, int] | None:
    """The first product that reads a value of the size of `start`, or without one of its columns, made from it."""
    return next(_products(users, start), None)


def _products(users: dict[Value, list[Record | Value]], *starts: Value) -> Iterator[tuple[Record, int]]:
    """Such products, the nearest first, and the position of the value among their factors."""
    todo, seen = list(starts), set(starts)
    while todo and len(seen) < MAX_REACH:
        value = todo.pop(0)
        for record in users.get(value, ()):
            if isinstance(record, Value):
                todo.append(record)
                seen.add(record)
                continue
            if record.op in PRODUCTS:
                first = PRODUCTS[record.op]
                yield from ((record, side) for side in (0, 1) if record.args[first + side] is value)
                continue
            for out in record.outputs:
                kept = same(_size(out), _size(value)) or record.op in _PARTS or _shorter_by_one(record, value, out)
                if kept and out not in seen:
                    seen.add(out)
                    todo.append(out)


def _size(value: Value) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*map(expr_of, value.shape)))


def _shorter_by_one(record: Record, value: Value, out: Value) -> bool:
    """Whether a call leaves out the first or the last element of one dim."""
    if record.op not in ("slice.Tensor", "split.Tensor", "split_with_sizes.default"):
        return False
    less = [expr_of(a) - expr_of(b) for a, b in zip(value.shape, out.shape, strict=True) if not same(expr_of(a), expr_of(b))]
    return len(less) == 1 and same(less[0], sympy.S.One)
