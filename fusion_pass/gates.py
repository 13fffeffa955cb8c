"""A gate on the output that is a sink (granite's spelling): the output times the share of each row that is not the sink's.

    softmax(x) v sigmoid(logsumexp_k(x_k) - z)  =  softmax(x; z) v        with x the scores and z a sink, see `sinks`

A row of -inf is NaN in both, for the softmax of its scores is: such a program has no `zero_rows`.  A sink of +inf is not one
that a row can be compared with: the gate gives 0 there, the softmax NaN.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalSubscript=false, reportIndexIssue=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from fusion_kernels.program import Node

from .describe import Describer
from .tape import Record, Shadow, Value
from .views import VIEWS

__all__ = ["Gate", "find_gate", "sink_of"]

MAX_VIEWS = 6  # between the product with the values and the gate
MAX_CALLS = 16  # between the log-sum-exp and the gate


@dataclass(frozen=True)
class Gate:
    """A multiplication that alone reads a value.

    record: the multiplication. other: its other factor. views: what leads from the value to it, outermost first.
    """

    record: Record
    other: Value
    views: list[Value]


def find_gate(shadow: Shadow, value: Value) -> Gate | None:
    """The multiplication, by something made of a log-sum-exp, that alone reads `value`; None if there is none."""
    views: list[Value] = []
    for _ in range(MAX_VIEWS):
        readers = shadow.readers.get(value, [])
        if len(readers) != 1 or not isinstance(readers[0], Record) or readers[0].mutates or len(readers[0].outputs) != 1:
            return None
        if value.node is not None and len(value.node.users) != 1:  # the graph returns it, say
            return None
        (record,), (out,) = readers, readers[0].outputs
        if record.op in VIEWS and record.args[0] is value:
            value = out
            views.insert(0, value)
            continue
        if record.op != "mul.Tensor" or out.shape != value.shape or out.dtype != value.dtype or out.node is None:
            return None
        other = record.args[1] if record.args[0] is value else record.args[0]
        return Gate(record, other, views) if isinstance(other, Value) and _of_a_log_sum(other) else None
    return None


def _of_a_log_sum(value: Value) -> bool:
    todo, seen = [value], 0
    while todo and seen < MAX_CALLS:
        record, seen = todo.pop(0).record, seen + 1
        if record is not None and record.op == "logsumexp.default":
            return True
        todo += record.inputs if record is not None else ()
    return False


def sink_of(d: Describer, gate: Gate, index: Sequence[sympy.Expr], body: Node, axis: sympy.Symbol) -> Node | None:
    """The sink that the gate makes of the softmax of `body` over `axis`, or None; index: an element of the gated output."""
    share = _unnarrowed(d.element(gate.other, d.broadcast(gate.other, index)))
    difference = _unnarrowed(share.args[0]) if share.op == "sigmoid" else share
    if difference.op != "sub":
        return None
    total, sink = _unnarrowed(difference.args[0]), difference.args[1]
    if total.op != "logsumexp" or len(total.args) != 1:
        return None
    scores = d.substitute(total.args[0], {total.attr[0]: axis})
    return sink if _unnarrowed(scores) is _unnarrowed(body) else None


def _unnarrowed(node: Node) -> Node:
    while node.op == "narrowed":
        node = node.args[0]
    return node
