"""The gradient of a score program, as expressions over the same leaves: reverse mode, one line of calculus per operation.

The root's cotangent is the leaf ``grad``; the result reads the program's own nodes, so whoever evaluates or compiles both
(forward value and gradient) computes each shared subexpression once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from .program import GRAD, SCORE, Node, Program, apply, const, postorder

__all__ = ["RULES", "Vjp", "vjp"]


@dataclass(frozen=True)
class Vjp:
    """The vector-Jacobian product of a program, elementwise over (b, h, q, k).

    dscore: d(loss)/d(score), given ``grad`` = d(loss)/d(result).
    loads: for each load of a captured tensor asked for, the load and d(loss)/d(its value). The gradient of the tensor is
        the sum of that value over every (b, h, q, k), added at the load's index. A load that the result does not depend on
        smoothly is absent.
    """

    dscore: Node
    loads: tuple[tuple[Node, Node], ...]


ZERO = const(0.0)
Rule = Callable[[Node, Node], "tuple[Node, ...]"]


def _add(a: Node, b: Node) -> Node:
    return apply("add", a, b)


def _sub(a: Node, b: Node) -> Node:
    return apply("sub", a, b)


def _mul(a: Node, b: Node | float) -> Node:
    return apply("mul", a, b if isinstance(b, Node) else const(b))


def _div(a: Node, b: Node | float) -> Node:
    return apply("div", a, b if isinstance(b, Node) else const(b))


def _neg(a: Node) -> Node:
    return apply("neg", a)


def _where(p: Node, a: Node, b: Node) -> Node:
    return apply("where", p, a, b)


def _if_zero(x: Node, a: Node, b: Node) -> Node:
    return _where(apply("eq", x, ZERO), a, b)


def _extremum(loses: str) -> Rule:
    """maximum, minimum: all to the winner, half each on a tie, all to both beside a NaN (as torch does)."""

    def rule(g: Node, y: Node) -> tuple[Node, ...]:
        a, b = y.args
        shared = _where(apply("eq", a, b), _div(g, 2.0), g)
        return _where(apply(loses, a, b), ZERO, shared), _where(apply(loses, b, a), ZERO, shared)

    return rule


def _abs(g: Node, y: Node) -> tuple[Node, ...]:
    (a,) = y.args  # sign(a) g, and 0 g (NaN if g is) at 0 and NaN
    return (_where(apply("gt", a, ZERO), g, _where(apply("lt", a, ZERO), _neg(g), _mul(g, ZERO))),)


def _pow(g: Node, y: Node) -> tuple[Node, ...]:
    a, b = y.args
    # d(a^b)/da = b a^(b-1), and 0 for b = 0 even at a = 0
    less = _sub(b, const(1.0))
    da = _if_zero(b, ZERO, _mul(g, _mul(b, a if less is const(1.0) else apply("pow", a, less))))
    # d(a^b)/db = a^b log a, and 0 at a = 0 for b >= 0
    flat = apply("and", apply("eq", a, ZERO), apply("ge", b, ZERO))
    return da, _where(flat, ZERO, _mul(g, _mul(y, apply("log", a))))


def _nothing(g: Node, y: Node) -> tuple[Node, ...]:
    return (ZERO,) * len(y.args)


# op -> rule(g, y): the cotangents of y's arguments, where y is the node itself and g its cotangent.
RULES: dict[str, Rule] = {
    "add": lambda g, y: (g, g),  # d(a + b) = da + db
    "sub": lambda g, y: (g, _neg(g)),  # d(a - b) = da - db
    "mul": lambda g, y: (_mul(g, y.args[1]), _mul(g, y.args[0])),  # d(a b) = b da + a db
    "div": lambda g, y: (_div(g, y.args[1]), _neg(_div(_mul(g, y), y.args[1]))),  # d(a / b) = da / b - (a / b) db / b
    "pow": _pow,
    "maximum": _extremum("lt"),
    "minimum": _extremum("gt"),
    "neg": lambda g, y: (_neg(g),),
    "abs": _abs,
    "exp": lambda g, y: (_mul(g, y),),  # e^a
    "expm1": lambda g, y: (_mul(g, _add(y, const(1.0))),),  # e^a
    "log": lambda g, y: (_div(g, y.args[0]),),  # 1 / a
    "log1p": lambda g, y: (_div(g, _add(y.args[0], const(1.0))),),  # 1 / (1 + a)
    "sqrt": lambda g, y: (_div(g, _mul(y, 2.0)),),  # 1 / (2 sqrt a)
    "rsqrt": lambda g, y: (_mul(_mul(g, _mul(y, _mul(y, y))), -0.5),),  # -a^(-3/2) / 2
    "tanh": lambda g, y: (_mul(g, _sub(const(1.0), _mul(y, y))),),  # 1 - tanh^2
    "sigmoid": lambda g, y: (_mul(g, _mul(y, _sub(const(1.0), y))),),  # sigma (1 - sigma)
    "sin": lambda g, y: (_mul(g, apply("cos", y.args[0])),),
    "cos": lambda g, y: (_neg(_mul(g, apply("sin", y.args[0]))),),
    # 2 / sqrt(pi) e^(-a^2)
    "erf": lambda g, y: (_mul(g, _mul(apply("exp", _neg(_mul(y.args[0], y.args[0]))), 2.0 / math.sqrt(math.pi))),),
    "floor": _nothing,
    "ceil": _nothing,
    "trunc": _nothing,
    # The branch not taken gets 0, not 0 * (its derivative): an inf or NaN there must not leak.
    "where": lambda g, y: (ZERO, _where(y.args[0], g, ZERO), _where(y.args[0], ZERO, g)),
    # A cast's gradient passes as it is: rounding it again would only add error.
    "round_float16": lambda g, y: (g,),
    "round_bfloat16": lambda g, y: (g,),
}


@lru_cache(maxsize=1024)
def vjp(program: Program, wrt: tuple[int, ...] = ()) -> Vjp:
    """The gradient of `program` with respect to its score and to the captures at the positions `wrt`.

    Args:
        program: the score program.
        wrt: positions in ``program.captures`` of float captures that need a gradient.

    Raises:
        ValueError: a position is outside the captures, or names an integer or boolean capture.
    """
    for i in wrt:
        if not 0 <= i < len(program.captures) or program.captures[i].kind != "float":
            raise ValueError(
                f"fusion_kernels: capture {i} cannot have a gradient; float captures are "
                f"{[j for j, c in enumerate(program.captures) if c.kind == 'float']}"
            )
    order = tuple(postorder(program.root))
    smooth: set[Node] = set()  # float nodes through which the score or a wanted load reaches the result
    for node in order:
        own = node is SCORE or (node.op == "load" and node.attr in wrt)
        if own or (node.op in RULES and node.kind == "float" and any(a in smooth for a in node.args)):
            smooth.add(node)
    cotangent: dict[Node, Node] = {program.root: GRAD}
    for node in reversed(order):
        g = cotangent.get(node)
        if g is None or node not in smooth or node.op not in RULES:
            continue
        for a, da in zip(node.args, RULES[node.op](g, node), strict=True):
            if a in smooth and da is not ZERO:
                cotangent[a] = _add(cotangent[a], da) if a in cotangent else da
    dscore = cotangent.get(SCORE, ZERO) if SCORE in smooth else ZERO
    loads = tuple((n, cotangent[n]) for n in order if n.op == "load" and n in smooth and n in cotangent)
    return Vjp(dscore, loads)
