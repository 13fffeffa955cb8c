"""Numbers and kinds: how torch's dtypes, Python's numbers and symbolic sizes become nodes of the three kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from fusion_kernels.program import Node, apply, const, postorder

from .indexing import expr_of

__all__ = ["cast", "has_score", "power", "promote", "scalar", "sym", "to_bool", "to_float", "to_int"]


def sym(expr: Any) -> Node:
    """An integer expression over axes as a node; plain numbers are constants."""
    expr = sympy.expand(expr)
    return const(int(expr)) if expr.is_Integer else Node.make("sym", attr=expr, kind="int")


def has_score(node: Node) -> bool:
    """Whether a product of matrices is read below."""
    return any(n.op in ("dot", "join") for n in postorder(node))


# ---------------------------------------------------------------- kinds


def to_float(x: Node) -> Node:
    if x.kind == "float":
        return x
    return const(float(x.attr)) if x.op == "const" else apply("to_float", x)  # pyright: ignore


def to_int(x: Node) -> Node:
    if x.kind == "int":
        return x
    return const(int(x.attr)) if x.op == "const" and x.kind == "bool" else apply("to_int", x)  # pyright: ignore


def to_bool(x: Node) -> Node:
    return x if x.kind == "bool" else apply("to_bool", x)


def cast(x: Node, dtype: torch.dtype, rounds: bool = True) -> Node:
    """`x` as a value of `dtype`. Scores are not rounded to 16 bits (they only get closer to float64); masks are, for a
    mask of -1e9 is -inf in fp16 and that decides what a fully masked row gives."""
    if dtype == torch.bool:
        return to_bool(x)
    if not dtype.is_floating_point:
        return to_int(x)
    x = to_float(x)
    if not rounds or dtype not in (torch.float16, torch.bfloat16):
        return x
    return _rounded(x, "round_float16" if dtype == torch.float16 else "round_bfloat16")


def _rounded(x: Node, op: str) -> Node:
    if x.op == op or x.op == "value" or (x.op == "to_float" and x.args[0].kind == "bool"):
        return x  # a loaded tensor of that dtype is exact; a wider one was cast by a call of its own, see _to_copy
    if x.op == "where":
        return apply("where", x.args[0], _rounded(x.args[1], op), _rounded(x.args[2], op))
    if x.op == "neg":
        return apply("neg", _rounded(x.args[0], op))
    return apply(op, x)


def scalar(x: Any) -> Node:
    """A Python or symbolic number as a node."""
    if isinstance(x, torch.SymInt):
        return sym(expr_of(x))
    if isinstance(x, torch.SymFloat):
        return _float_expr(sympy.sympify(x.node.expr))
    if isinstance(x, torch.SymBool):
        raise NotImplementedError("a symbolic truth value in a score")
    return const(x)


# SymFloat expressions by the names torch gives their functions
_FLOAT_FUNCTIONS = {
    "OpaqueUnaryFn_sqrt": "sqrt",
    "OpaqueUnaryFn_exp": "exp",
    "OpaqueUnaryFn_log": "log",
    "OpaqueUnaryFn_tanh": "tanh",
}


def _float_expr(expr: sympy.Expr) -> Node:
    if expr.is_number:
        return const(float(expr))
    if expr.is_Symbol and not expr.is_integer:
        return Node.make("number", attr=expr, kind="float")
    name = type(expr).__name__
    if expr.is_integer and not expr.has(sympy.Float):
        return to_float(sym(expr))
    if name == "ToFloat":
        return to_float(sym(expr.args[0]))
    args = [_float_expr(a) for a in expr.args]  # pyright: ignore
    if name in _FLOAT_FUNCTIONS:
        return apply(_FLOAT_FUNCTIONS[name], *args)
    if name in ("FloatTrueDiv", "IntTrueDiv"):
        return apply("div", *args)
    if name in ("FloatPow", "Pow"):
        return power(args[0], args[1])
    if expr.is_Mul or expr.is_Add:
        result = args[0]
        for a in args[1:]:
            result = apply("mul" if expr.is_Mul else "add", result, a)
        return result
    return Node.make("number", attr=expr, kind="float")  # read at run time


def promote(*xs: Node) -> tuple[Node, ...]:
    if any(x.kind == "float" for x in xs):
        return tuple(map(to_float, xs))
    return tuple(map(to_int, xs))


def power(a: Node, b: Node) -> Node:
    a, b = to_float(a), to_float(b)
    named: dict[object, Callable[[], Node]] = {
        2.0: lambda: apply("mul", a, a),
        1.0: lambda: a,
        0.5: lambda: apply("sqrt", a),
        -0.5: lambda: apply("rsqrt", a),
        -1.0: lambda: apply("div", const(1.0), a),
    }
    return named[b.attr]() if b.op == "const" and b.attr in named else apply("pow", a, b)
