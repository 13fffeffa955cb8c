"""Rules for tensors that are put together along a dim: ``cat``, and ``pad`` with a number.

An element read at an index that stays inside one part is an element of that part.  Where the index may run over several
parts, the tensor is a leaf: ``value``, or ``join`` if one of its parts is made of scores.  The latter tells who splits a
softmax at the seam (`sinks`) that there is something to find, and becomes an element of one part once its axis is narrowed.
"""

# sympy is not typed
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
from fusion_kernels.program import Node

from .indexing import expr_of
from .kinds import cast, has_score
from .pointwise import Rule
from .tape import Record, Value

if TYPE_CHECKING:
    from .describe import Describer

__all__ = ["RULES"]

Part = tuple[sympy.Expr, Callable[[sympy.Expr], Node]]  # its size along the dim, and its element at a place along the dim


def _cat(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    tensors = [x for x in record.args[0] if len(x.shape) == len(value.shape)]  # torch lets empty ones of shape (0,) pass
    dim = (record.args[1] if len(record.args) > 1 else record.kwargs.get("dim", 0)) % len(value.shape)

    def part(x: Value) -> Part:
        return expr_of(x.shape[dim]), lambda at: d.element(x, (*index[:dim], at, *index[dim + 1 :]))

    return _joined(d, record, index, value, dim, [part(x) for x in tensors])


def _pad(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    """Of one dim; others go by the name of the tensor."""
    x, widths = record.args[0], [expr_of(w) for w in record.args[1]]
    pairs = [widths[i : i + 2] for i in range(0, len(widths), 2)]  # of the last dim, the one before, ...
    padded = [len(x.shape) - 1 - i for i, pair in enumerate(pairs) if pair != [0, 0]]
    if len(padded) != 1:
        return None
    dim = padded[0]
    left, right = pairs[len(x.shape) - 1 - dim]
    given = record.args[2] if len(record.args) > 2 else record.kwargs.get("value")
    number = cast(d.arg(0.0 if given is None else given, record, index), value.dtype)

    def inside(at: sympy.Expr) -> Node:
        return d.element(x, (*index[:dim], at, *index[dim + 1 :]))

    parts: list[Part] = [(left, lambda at: number), (expr_of(x.shape[dim]), inside), (right, lambda at: number)]
    return _joined(d, record, index, value, dim, parts)


def _joined(d: Describer, record: Record, index: Any, value: Value, dim: int, parts: Sequence[Part]) -> Node | None:
    start = sympy.S.Zero
    for size, element in parts:
        at = sympy.expand(index[dim] - start)
        if d.axes.inside(at, size):
            return element(at)
        start += size
    if not value.dtype.is_floating_point:
        return None
    for i, (size, element) in enumerate(parts):
        if size != 0 and has_score(element(d.bound_axis(record, size, "j", i))):
            return Node.make("join", attr=(value.id, tuple(index)), kind="float")
    return None


RULES: dict[str, Rule] = {"cat": _cat, "constant_pad_nd": _pad}
