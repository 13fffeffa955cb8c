"""Sizes under dynamic shapes: one normal form for expressions that the guards of a compile make equal.

Dynamo has compared sizes before the pass sees them, and recompiles where a comparison comes out otherwise.  ``x.view(b, n, h,
d)`` leaves ``Mod(s1, s2) = 0`` behind, a product of q and k ``s1 // s2 = s3 // 4``.  ShapeEnv keeps most of these as guards
and rewrites nothing by them, so the same size is written ``s1 // s2`` here and ``s3 // 4`` there.  Here the equations are
solved, one after the other, over the polynomials whose unknowns are the symbols and the quotients:

    a % b = 0        a = b * (a // b)
    m * f = m * g    f = g            m a product of sizes known not to be 0
    x = f            x := f           x not in f; a quotient is eliminated before a symbol

Nothing is guarded here: an equation is used because the compile rests on it already.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import reduce
from math import gcd
from typing import Any

import sympy
from sympy.core.function import Application
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv

__all__ = ["Sizes", "sizes_of", "whole"]

_MODULO = ("Mod", "PythonMod")
_ROUNDS = 4  # an equation may become solvable by one that stands after it


def whole(expr: sympy.Expr) -> bool:
    """Whether nothing is left below the fraction bar: s * t is whole, s / 3 + 2 / 3 is not."""
    return sympy.fraction(sympy.together(expr))[1] == 1


class Sizes:
    """The equations of one ShapeEnv, solved. They are read on: what is solved stays solved, new guards add to it."""

    def __init__(self, replaced: int = 0) -> None:
        self.read = 0  # guards
        self.replaced = replaced  # symbols that the ShapeEnv has replaced itself: they are in no expression any more
        self.names: dict[sympy.Expr, sympy.Symbol] = {}  # a quotient as torch writes it -> the symbol that stands for it
        self.values: dict[sympy.Symbol, sympy.Expr] = {}  # and back
        self.positive: set[sympy.Symbol] = set()
        self.unsolved: list[sympy.Expr] = []  # expressions that are 0
        self.solved: dict[sympy.Symbol, sympy.Expr] = {}
        self.written: dict[sympy.Expr, sympy.Symbol] = {}  # the value of a symbol that was solved for -> the symbol
        self.memo: dict[sympy.Expr, sympy.Expr] = {}

    def normal(self, expr: sympy.Expr) -> sympy.Expr:
        """The normal form: equal forms are equal sizes. Its symbols are the graph's, and quotients of them."""
        found = self.memo.get(expr)
        if found is None:
            found = _divided(_divided(expr).xreplace(self.names).xreplace(self.solved))
            self.memo[expr] = found = found if found == expr else sympy.expand(found)
        return found

    def plain(self, expr: sympy.Expr) -> sympy.Expr:
        """An expression in normal form over the graph's own symbols again, quotients written as torch writes them."""
        return self.written.get(expr) or expr.xreplace(self.values)

    def learn(self, shape_env: ShapeEnv) -> None:
        """Take in the guards that have come since the last time."""
        relations = [_divided(shape_env.replace(guard.expr)) for guard in shape_env.guards[self.read :]]
        self.read = len(shape_env.guards)
        equations = list(_equations(relations))
        for quotient in sorted({q for e in equations for q in e.atoms(FloorDiv)}, key=sympy.default_sort_key):
            self.names.setdefault(quotient, sympy.Symbol(str(quotient), integer=True, nonnegative=True))
        self.values = {symbol: quotient for quotient, symbol in self.names.items()}
        self.positive |= {s for s, r in shape_env.var_to_range.items() if r.lower >= 1}
        for relation in relations:
            if isinstance(relation, sympy.Ne) and relation.rhs == 0:  # sizes are never negative
                self.positive |= {f for f in sympy.Mul.make_args(relation.lhs.xreplace(self.names)) if f.is_Symbol}
        before = len(self.solved)
        self._solve([*self.unsolved, *(e.xreplace(self.names) for e in equations)])
        if len(self.solved) > before:
            self.memo.clear()
            plain = {symbol: value for symbol, value in self.solved.items() if symbol not in self.values}
            self.written = {value: symbol for symbol, value in plain.items() if not value.is_Atom}

    def _solve(self, equations: list[sympy.Expr]) -> None:
        for _ in range(_ROUNDS):
            self.unsolved = []
            for equation in equations:
                difference = sympy.expand(equation.xreplace(self.solved))
                found = self._unknown(difference)
                if found is not None:
                    symbol, value = found
                    self.solved = {s: sympy.expand(v.xreplace({symbol: value})) for s, v in self.solved.items()}
                    self.solved[symbol] = value
                elif difference != 0:
                    self.unsolved.append(difference)
            if len(self.unsolved) == len(equations):
                return
            equations = self.unsolved

    def _unknown(self, difference: sympy.Expr) -> tuple[sympy.Symbol, sympy.Expr] | None:
        """A symbol x and f with ``difference = c m (x - f)``, m not 0."""
        symbols = sorted(difference.free_symbols, key=lambda s: (s not in self.names.values(), s.name))
        if not symbols or not difference.is_polynomial(*symbols):
            return None
        terms = dict(sympy.Poly(difference, *symbols).terms())
        shared = [
            min(powers) if symbol in self.positive else 0
            for symbol, powers in zip(symbols, zip(*terms, strict=True), strict=True)
        ]
        content = reduce(gcd, (int(c) for c in terms.values()))
        terms = {tuple(p - s for p, s in zip(t, shared, strict=True)): int(c) // content for t, c in terms.items()}
        for i, symbol in enumerate(symbols):
            alone = tuple(int(i == j) for j in range(len(symbols)))
            if abs(terms.get(alone, 0)) == 1 and sum(1 for t in terms if t[i]) == 1:
                rest = (
                    -terms[alone] * c * sympy.Mul(*(s**p for s, p in zip(symbols, t, strict=True)))
                    for t, c in terms.items()
                    if t != alone
                )
                return symbol, sympy.Add(*rest)
        return None


def _equations(relations: list[Any]) -> Iterator[sympy.Expr]:
    """Each equation of sizes among the guards, as an expression that is zero."""
    for relation in relations:
        if not isinstance(relation, sympy.Eq):
            continue
        left, right = relation.args
        if type(left).__name__ in _MODULO and right == 0:
            dividend, divisor = left.args
            quotient = sympy.cancel(dividend / divisor)
            if not whole(quotient):
                left, right = dividend, divisor * FloorDiv(dividend, divisor)
        difference = left - right
        if all(isinstance(f, FloorDiv) for f in difference.atoms(Application)):
            yield difference


def _is_quotient(expr: sympy.Expr) -> bool:
    return isinstance(expr, FloorDiv)


def _divided(expr: Any) -> Any:
    """The expression without quotients that leave no remainder whatever the sizes: torch writes ``(s * s) // s`` for s."""
    return expr.replace(_is_quotient, _exact) if expr.has(FloorDiv) else expr


def _exact(expr: sympy.Expr) -> sympy.Expr:
    quotient = sympy.cancel(expr.args[0] / expr.args[1])
    return quotient if whole(quotient) else expr


_known: weakref.WeakKeyDictionary[ShapeEnv, Sizes] = weakref.WeakKeyDictionary()


def sizes_of(shape_env: ShapeEnv) -> Sizes:
    """The equations of `shape_env` as it is now, solved."""
    sizes = _known.get(shape_env)
    if sizes is None or sizes.read > len(shape_env.guards) or sizes.replaced != len(shape_env.replacements):
        sizes = _known[shape_env] = Sizes(len(shape_env.replacements))
    if sizes.read < len(shape_env.guards):
        sizes.learn(shape_env)
    return sizes
