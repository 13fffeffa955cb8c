"""Rules for ATen calls that are no function of one element: sums, maxima and softmaxes along a dim, and random draws.

A reduced dim becomes a bound axis, one a call; a draw is known by the number of its call and where it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusion_kernels.program import Node

from .kinds import to_float
from .pointwise import Rule, args_of
from .tape import Record, Value

if TYPE_CHECKING:
    from .describe import Describer

__all__ = ["RULES"]


def _reduction(op: str) -> Rule:
    """sum, amax and logsumexp over one dim: a bound axis, one arg."""

    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        x = record.args[0]
        dims = record.args[1] if len(record.args) > 1 else record.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or ())
        if len(dims) != 1 or not x.dtype.is_floating_point or (op == "amax" and value.output != 0):
            return None
        dim = dims[0] % len(x.shape)
        keep = record.args[2] if len(record.args) > 2 else record.kwargs.get("keepdim", False)
        axis = d.bound_axis(record, x.shape[dim], "k")
        inner = [*index[:dim], axis, *index[dim + (1 if keep else 0) :]]
        return Node.make(op, to_float(d.element(x, inner)), attr=(axis, None), kind="float")

    return rule


def _softmax(op: str, zero_rows: bool = False) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        x, dim = record.args[0], record.args[1]
        if not x.shape:
            return None
        dim %= len(x.shape)
        axis = d.bound_axis(record, x.shape[dim], "k")
        inner = [*index[:dim], axis, *index[dim + 1 :]]
        return Node.make(op, to_float(d.element(x, inner)), attr=(axis, index[dim], zero_rows, False), kind="float")

    return rule


def _dropout(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    if value.output != 0:
        return None
    (x,) = args_of(d, record, index, 1)
    p, training = record.args[1], record.args[2]
    if not training or p == 0:
        return x
    return Node.make("dropout", to_float(x), attr=(float(p), record.seq, tuple(index)), kind="float")


def _bernoulli(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    """1 with a probability that is one number: the second argument, or what fills the tensor given."""
    if record.func._overloadname == "default":
        (given,) = args_of(d, record, index, 1)
        if given.op != "const":
            return None
        keep: Any = given.attr
    else:
        keep = record.args[1] if len(record.args) > 1 else record.kwargs.get("p", 0.5)
    return Node.make("bernoulli", attr=(float(keep), record.seq, tuple(index)), kind="float")


RULES: dict[str, Rule] = {
    "_softmax": _softmax("softmax"),
    "_safe_softmax": _softmax("softmax", zero_rows=True),
    "_log_softmax": _softmax("log_softmax"),
    "amax": _reduction("amax"),
    "max.dim": _reduction("amax"),
    "sum.dim_IntList": _reduction("sum"),
    "logsumexp": _reduction("logsumexp"),
    "native_dropout": _dropout,
    **{f"bernoulli.{name}": _bernoulli for name in ("float", "p", "default")},
}
