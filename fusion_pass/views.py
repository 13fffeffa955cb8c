"""View rules: for each ATen op that only moves elements, where element `index` of the result lies in the input.

A rule is ``(axes, record, index, output) -> index of record.args[0]``.  Copies (clone, contiguous) move nothing.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy

from .indexing import Axes, expr_of, merge_index
from .tape import Record, Value

__all__ = ["COPIES", "VIEWS", "source_index"]

Index = Sequence[sympy.Expr]
Rule = Callable[[Axes, Record, Index, int], list[sympy.Expr]]


def _input(record: Record) -> Value:
    assert isinstance(record.args[0], Value)
    return record.args[0]


def _arg(record: Record, position: int, name: str, default: Any) -> Any:
    return record.args[position] if len(record.args) > position else record.kwargs.get(name, default)


def _dim(record: Record, position: int = 1, default: int = 0) -> int:
    rank = len(_input(record).shape)
    return _arg(record, position, "dim", default) % max(rank, 1)


def _identity(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    return list(index)


def _reshape(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    return merge_index(axes, record.outputs[output].shape, _input(record).shape, index)


def _expand(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    shape = _input(record).shape
    tail = index[len(index) - len(shape) :] if shape else []
    return [sympy.S.Zero if expr_of(s) == 1 else i for s, i in zip(shape, tail, strict=True)]


def _permute(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    result = [sympy.S.Zero] * len(index)
    for i, dim in zip(index, record.args[1], strict=True):
        result[dim % len(index)] = i
    return result


def _transpose(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    result = list(index)
    if len(result) < 2:
        return result
    a, b = (record.args[1], record.args[2]) if len(record.args) > 2 else (0, 1)
    result[a], result[b] = result[b], result[a]
    return result


def _unsqueeze(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    dim = record.args[1] % len(index)
    return [*index[:dim], *index[dim + 1 :]]


def _squeeze(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    shape = _input(record).shape
    dims = _arg(record, 1, "dim", range(len(shape)))
    dims = {d % max(len(shape), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    rest = iter(index)
    return [sympy.S.Zero if d in dims and expr_of(s) == 1 else next(rest) for d, s in enumerate(shape)]


def _offset(start: Any, size: Any) -> sympy.Expr:
    return expr_of(start + size if start < 0 else start)


def _select(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    dim = _dim(record)
    return [*index[:dim], _offset(record.args[2], _input(record).shape[dim]), *index[dim:]]


def _slice(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    dim, size = _dim(record), _input(record).shape[_dim(record)]
    start, step = _arg(record, 2, "start", None), _arg(record, 4, "step", 1)
    result = list(index)
    if start is not None:
        first = start + size if start < 0 else start
        result[dim] = index[dim] * step + (sympy.S.Zero if first < 0 else expr_of(first))
    else:
        result[dim] = index[dim] * step
    return result


def _split(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    dim = _dim(record, 2)
    start = sum((expr_of(v.shape[dim]) for v in record.outputs[:output]), sympy.S.Zero)
    result = list(index)
    result[dim] = index[dim] + start
    return result


def _unbind(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    dim = _dim(record)
    return [*index[:dim], sympy.Integer(output), *index[dim:]]


def _flip(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    shape = _input(record).shape
    dims = {d % len(shape) for d in record.args[1]}
    return [expr_of(s) - 1 - i if d in dims else i for d, (s, i) in enumerate(zip(shape, index, strict=True))]


def _repeat(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    shape = _input(record).shape
    tail = index[len(index) - len(shape) :] if shape else []
    return [axes.mod(i, expr_of(s)) for s, i in zip(shape, tail, strict=True)]


def _repeat_interleave(axes: Axes, record: Record, index: Index, output: int) -> list[sympy.Expr]:
    dim = _dim(record, 2)
    result = list(index)
    result[dim] = axes.div(index[dim], expr_of(record.args[1]))
    return result


COPIES = frozenset({"clone.default", "contiguous.default"})

VIEWS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "clone.default",
            "contiguous.default",
            "alias.default",
            "detach.default",
            "lift_fresh.default",
            "lift_fresh_copy.default",
        ),
        _identity,
    ),
    **dict.fromkeys(("view.default", "_unsafe_view.default", "reshape.default", "_reshape_alias.default"), _reshape),
    "expand.default": _expand,
    "permute.default": _permute,
    **dict.fromkeys(("transpose.int", "t.default"), _transpose),
    "unsqueeze.default": _unsqueeze,
    **dict.fromkeys(("squeeze.default", "squeeze.dim", "squeeze.dims"), _squeeze),
    "select.int": _select,
    "slice.Tensor": _slice,
    **dict.fromkeys(("split.Tensor", "split_with_sizes.default"), _split),
    "unbind.int": _unbind,
    "flip.default": _flip,
    "repeat.default": _repeat,
    "repeat_interleave.self_int": _repeat_interleave,
}


def source_index(axes: Axes, value: Value, index: Index) -> tuple[Value, list[sympy.Expr]] | None:
    """One step down a chain of views: the value below and the index into it; None where `value` is no view."""
    record = value.record
    if record is None or record.mutates or record.op not in VIEWS:
        return None
    if record.op == "repeat_interleave.self_int" and _arg(record, 2, "dim", None) is None:
        return None
    below = _input(record)
    if below.record is None and below.node is None:
        return None  # a constant that the call itself made: nothing in the graph holds it
    return below, VIEWS[record.op](axes, record, index, value.output)
