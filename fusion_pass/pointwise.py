"""Rules for ATen calls that compute each element by itself: what a score may be made of.

A rule is ``(describer, record, index, value) -> node`` or None where the call is of a form that has no exact description.
Rules are data: most are one op of the score program.  Floating-point algebra is left alone; integers are sympy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from fusion_kernels.program import Node, apply, const

from .activations import ACTIVATIONS
from .float16_masks import rounded_sum
from .indexing import expr_of
from .kinds import cast, power, promote, scalar, sym, to_bool, to_float, to_int
from .tape import Record, Value

if TYPE_CHECKING:
    from .describe import Describer

__all__ = ["RULES", "Rule", "args_of", "clamped"]

Rule = Callable[["Describer", Record, Any, Value], "Node | None"]


# ---------------------------------------------------------------- arithmetic


def _binary(op: str, a: Node, b: Node) -> Node:
    """add, sub, mul, maximum, minimum with torch's promotion; integers over axes stay one sympy expression."""
    a, b = promote(a, b)
    if a.kind == "int" and {a.op, b.op} <= {"sym", "const"} and op in _INT:
        return sym(_INT[op](*(x.attr if x.op == "sym" else sympy.Integer(x.attr) for x in (a, b))))  # pyright: ignore
    return apply(op, a, b)


_INT: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


def args_of(d: Describer, record: Record, index: Any, count: int) -> list[Node]:
    return [d.arg(x, record, index) for x in record.args[:count]]


def _arith(op: str, flip: bool = False) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        a, b = args_of(d, record, index, 2)
        alpha = record.args[2] if len(record.args) > 2 else record.kwargs.get("alpha", 1)
        if alpha != 1:
            b = _binary("mul", b, scalar(alpha))
        if flip:
            a, b = b, a
        if value.dtype == torch.bool:
            return apply({"add": "or", "mul": "and"}[op], to_bool(a), to_bool(b)) if op in ("add", "mul") else None
        if value.dtype == torch.float16 and op in ("add", "sub"):
            return rounded_sum(d, _binary(op, a, b), a, b)
        return _binary(op, a, b)

    return rule


def _div(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    a, b = args_of(d, record, index, 2)
    mode = record.kwargs.get("rounding_mode")
    if mode is not None:
        return _integer_division("floordiv", a, b) if mode == "floor" else None
    return apply("div", to_float(a), to_float(b))


def _integer_division(op: str, a: Node, b: Node) -> Node | None:
    if a.kind == "float" or b.kind == "float":
        return apply("floor", apply("div", to_float(a), to_float(b))) if op == "floordiv" else None
    positive = (b.op == "const" and b.attr > 0) or (b.op == "sym" and b.attr.is_positive)  # pyright: ignore
    return apply(op, to_int(a), b) if positive else None


def _division(op: str) -> Rule:
    return lambda d, record, index, value: _integer_division(op, *args_of(d, record, index, 2))


def _unary(op: str) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        (a,) = args_of(d, record, index, 1)
        return apply(op, a if op in ("neg", "abs") and a.kind == "int" else to_float(a))

    return rule


def _neg(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    (a,) = args_of(d, record, index, 1)
    return _binary("sub", const(0), a) if a.kind == "int" else apply("neg", to_float(a))


def _formula(build: Callable[[Node], Node]) -> Rule:
    return lambda d, record, index, value: build(to_float(args_of(d, record, index, 1)[0]))


# ---------------------------------------------------------------- choice and comparison


def _integral(x: Node) -> Node | None:
    """An integer below a conversion to float, exact up to 2**24 (positions are)."""
    if x.op == "to_float" and x.args[0].kind == "int":
        return x.args[0]
    if x.op == "const" and isinstance(x.attr, float) and x.attr.is_integer() and abs(x.attr) < 2**24:
        return const(int(x.attr))
    return None


def _compare(op: str) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        a, b = args_of(d, record, index, 2)
        if a.kind == b.kind == "bool":
            return {"eq": apply("not", apply("xor", a, b)), "ne": apply("xor", a, b)}.get(op)
        if "bool" in (a.kind, b.kind):  # mask == 0, mask != True and their like
            flag, other = (a, b) if a.kind == "bool" else (b, a)
            if op in ("eq", "ne") and other.op == "const" and other.attr in (0, 1):
                return flag if (op == "eq") == bool(other.attr) else apply("not", flag)
        a, b = promote(a, b)
        ia, ib = _integral(a), _integral(b)
        if ia is not None and ib is not None:
            a, b = ia, ib
        boolean = a.args[0] if a.op == "to_float" and a.args[0].kind == "bool" else None
        if boolean is not None and op in ("eq", "ne") and b.op == "const" and b.attr in (0.0, 1.0):
            return boolean if (op == "eq") == bool(b.attr) else apply("not", boolean)
        if a is b and a.kind == "float" and op in ("eq", "ne"):  # a number equals itself
            return apply("isnan", a) if op == "ne" else apply("not", apply("isnan", a))
        return apply(op, a, b)

    return rule


def _logic(op: str) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        args = args_of(d, record, index, 1 if op == "not" else 2)
        if value.dtype != torch.bool or (record.op.startswith("bitwise") and any(a.kind != "bool" for a in args)):
            return None
        return apply(op, *map(to_bool, args))

    return rule


def _select(condition: Node, a: Node, b: Node) -> Node:
    if a.kind != b.kind:
        a, b = promote(a, b)
    return apply("where", to_bool(condition), a, b)


def _where(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    return _select(*args_of(d, record, index, 3)) if len(record.args) == 3 else None


def _masked_fill(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    x, mask, fill = args_of(d, record, index, 3)
    return _select(mask, cast(fill, value.dtype), x)


def _index_put(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    """``x[:, mask] = number``: a choice, where the mask is of bools and the number one for all."""
    x, places, number = record.args[:3]
    accumulate = record.args[3] if len(record.args) > 3 else record.kwargs.get("accumulate", False)
    masks = [(dim, place) for dim, place in enumerate(places) if place is not None]
    if accumulate or len(masks) != 1 or masks[0][1].dtype != torch.bool or any(expr_of(s) != 1 for s in number.shape):
        return None
    dim, mask = masks[0]
    at = d.element(mask, index[dim : dim + len(mask.shape)])
    return _select(at, cast(d.arg(number, record, index), value.dtype), d.element(x, index))


def clamped(x: Node, low: Node | None, high: Node | None) -> Node:
    """where-forms with the gradient of torch's clamp: 1 inside the closed interval, 0 outside and at NaN."""
    inner = x if high is None else apply("where", apply("gt", *promote(x, high)), *promote(high, x))
    if low is not None:
        x, low = promote(x, low)
        inner = apply("where", apply("lt", x, low), *promote(low, inner))
    return inner if x.kind == "int" else apply("where", apply("isnan", to_float(x)), const(math.nan), to_float(inner))


def _clamp(which: str) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        x = to_float(args_of(d, record, index, 1)[0]) if value.dtype.is_floating_point else args_of(d, record, index, 1)[0]
        bounds = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",)}[which]
        found: dict[str, Node] = {}
        for position, name in enumerate(bounds, start=1):
            given = record.args[position] if len(record.args) > position else record.kwargs.get(name)
            if given is not None:
                found[name] = d.arg(given, record, index)
        return clamped(x, found.get("min"), found.get("max"))

    return rule


def _activation(build: Callable[..., Node]) -> Rule:
    """A function of one node and the numbers (or tensors) that the call gives besides."""

    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        given = [d.arg(x, record, index) if isinstance(x, Value) else x for x in record.args]
        return build(to_float(given[0]), *given[1:], **record.kwargs)

    return rule


def _nan_to_num(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    x = result = to_float(args_of(d, record, index, 1)[0])
    limits = torch.finfo(value.dtype)
    given = [
        record.args[i] if len(record.args) > i else record.kwargs.get(n) for i, n in enumerate(("nan", "posinf", "neginf"), 1)
    ]
    nan, high, low = (g if g is not None else e for g, e in zip(given, (0.0, limits.max, limits.min), strict=True))
    for found, given_value in (
        (apply("eq", x, const(-math.inf)), low),
        (apply("eq", x, const(math.inf)), high),
        (apply("isnan", x), nan),
    ):
        result = apply("where", found, const(float(given_value)), result)
    return result


def _triangle(op: str, default: int = 0) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        diagonal = record.args[1] if len(record.args) > 1 else record.kwargs.get("diagonal", default)
        (x,) = args_of(d, record, index, 1)
        keep = apply(op, sym(index[-1]), sym(index[-2] + expr_of(diagonal)))
        zero = {"float": const(0.0), "int": const(0), "bool": const(False)}[x.kind]
        if x.op == "const" and x.kind == "bool":
            return keep if x.attr else zero
        return apply("where", keep, x, zero)

    return rule


# ---------------------------------------------------------------- tensors made of nothing


def _full(position: int | None, fixed: float | None = None) -> Rule:
    def rule(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
        given = fixed if position is None else record.args[position]
        return cast(d.arg(given, record, index), value.dtype)

    return rule


def _arange(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    start, step = (record.args[0], 1) if len(record.args) > 1 else (0, 1)
    if len(record.args) > 2:
        step = record.args[2]
    if any(isinstance(x, (float, torch.SymFloat)) for x in (start, step)):
        return None
    return cast(sym(expr_of(start) + index[0] * expr_of(step)), value.dtype)


# ---------------------------------------------------------------- casts and copies


def _to_copy(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    (x,) = args_of(d, record, index, 1)
    from .describe import has_score

    narrow = {torch.float16: "round_float16", torch.bfloat16: "round_bfloat16"}.get(value.dtype)
    if narrow and record.args[0].dtype != value.dtype:
        if has_score(x):
            return Node.make("narrowed", to_float(x), attr=value.dtype, kind="float")
        if x.op == "value":
            return apply(narrow, to_float(x))
    return x


def _first(d: Describer, record: Record, index: Any, value: Value) -> Node | None:
    """copy_, fill_ and their like: the new contents, broadcast."""
    return cast(d.arg(record.args[1], record, index), value.dtype)


# ---------------------------------------------------------------- the table: ATen name (with or without overload) -> rule

_UNARY = [
    "abs",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "tanh",
    "sigmoid",
    "sin",
    "cos",
    "erf",
    "floor",
    "ceil",
    "trunc",
    "log1p",
    "expm1",
]

RULES: dict[str, Rule] = {
    "add": _arith("add"),
    "sub": _arith("sub"),
    "rsub": _arith("sub", flip=True),
    "mul": _arith("mul"),
    "div": _div,
    "true_divide": _div,
    "floor_divide": _division("floordiv"),
    "remainder": _division("mod"),
    "pow.Tensor_Scalar": lambda d, r, i, v: power(*args_of(d, r, i, 2)),
    "pow.Tensor_Tensor": lambda d, r, i, v: power(*args_of(d, r, i, 2)),
    "pow.Scalar": lambda d, r, i, v: power(*args_of(d, r, i, 2)),
    "maximum": lambda d, r, i, v: _binary("maximum", *args_of(d, r, i, 2)),
    "minimum": lambda d, r, i, v: _binary("minimum", *args_of(d, r, i, 2)),
    "neg": _neg,
    **{name: _unary(name) for name in _UNARY},
    "reciprocal": _formula(lambda x: apply("div", const(1.0), x)),
    "square": _formula(lambda x: apply("mul", x, x)),
    **{name: _activation(build) for name, build in ACTIVATIONS.items()},
    "isnan": _formula(lambda x: apply("isnan", x)),
    "isinf": _formula(lambda x: apply("isinf", x)),
    **{name: _compare(name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{f"{kind}_{name}": _logic(name) for kind in ("logical", "bitwise") for name in ("and", "or", "xor", "not")},
    "where": _where,
    "masked_fill": _masked_fill,
    "index_put": _index_put,
    "clamp": _clamp("clamp"),
    "clamp_min": _clamp("clamp_min"),
    "clamp_max": _clamp("clamp_max"),
    "nan_to_num": _nan_to_num,
    "tril": _triangle("le"),
    "triu": _triangle("ge"),
    "full": _full(1),
    "full_like": _full(1),
    "new_full": _full(2),
    "scalar_tensor": _full(0),
    **{name: _full(None, 0) for name in ("zeros", "zeros_like", "new_zeros", "zero")},
    **{name: _full(None, 1) for name in ("ones", "ones_like", "new_ones")},
    "arange": _arange,
    "fill": _first,
    "copy": _first,
    "_to_copy": _to_copy,
    "lift_fresh": lambda d, r, i, v: d.arg(r.args[0], r, i),
}
