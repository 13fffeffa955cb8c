"""Index algebra: where an element of a view comes from, as sympy expressions over the site's axes.

An *axis* is a sympy symbol that runs over ``range(size)``.  A view op turns the index of its result into the index of its
input; splitting and merging dims gives ``//`` and ``%``, which are simplified with the ranges of the axes at the moment they
are built, so that ``(b * H + h) // H`` is ``b``.  Sizes may be symbolic (dynamic shapes); nothing here adds a guard.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from .sizes import sizes_of, whole

__all__ = ["Axes", "Div", "Mod", "coefficient", "expr_of", "merge_index", "same", "whole"]


class Div(sympy.Function):
    """``a // b`` for ``a >= 0, b > 0``: a number where both are, else not simplified further."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        return a // b if a.is_Integer and b.is_Integer else None


class Mod(sympy.Function):
    """``a % b`` for ``a >= 0, b > 0``: a number where both are, else not simplified further."""

    nargs = (2,)
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        return a % b if a.is_Integer and b.is_Integer else None


def expr_of(value: Any) -> sympy.Expr:
    """The normal form of an int, a SymInt, or an expression already."""
    if isinstance(value, sympy.Expr):
        return value
    if isinstance(value, torch.SymInt):
        return sizes_of(value.node.shape_env).normal(value.node.expr)
    return sympy.Integer(int(value))


def same(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Provably equal (no guard: two symbols that merely happen to be equal now are different)."""
    if a == b or (a.is_Integer and b.is_Integer):
        return a == b
    return sympy.expand(a - b) == 0


def coefficient(expr: sympy.Expr, axis: sympy.Symbol) -> sympy.Expr:
    """What an expanded expression has times `axis`; 0 where it does not read it."""
    return expr.coeff(axis, 1)


def _nonnegative(expr: sympy.Expr) -> bool:
    """Every term of the expanded expression is >= 0, shape symbols being >= 1: sound, not complete."""
    expr = sympy.expand(expr)
    if expr.is_number:
        return bool(expr >= 0)
    # substitute s -> 1 + t, t >= 0: non-negative coefficients then suffice
    shifted = sympy.expand(expr.subs({s: 1 + sympy.Symbol(f"_{s}", integer=True, nonnegative=True) for s in expr.free_symbols}))
    return all(term.as_coeff_Mul()[0] >= 0 for term in sympy.Add.make_args(shifted)) and not shifted.has(Div, Mod)


class Axes:
    """The axes of one site: symbols with sizes, and the arithmetic that knows the ranges."""

    def __init__(self) -> None:
        self.sizes: dict[sympy.Symbol, sympy.Expr] = {}
        self.radices: list[tuple[sympy.Symbol, sympy.Expr]] = []  # (axis, n): some index divides the axis by n

    def new(self, name: str, size: sympy.Expr) -> sympy.Symbol:
        symbol = sympy.Symbol(f"{name}", integer=True, nonnegative=True)
        if symbol in self.sizes:
            return self.new(f"{name}_", size)
        self.sizes[symbol] = size
        return symbol

    def index(self, name: str, size: sympy.Expr) -> sympy.Expr:
        """A new axis, or 0 where there is but one element."""
        return sympy.S.Zero if size == 1 else self.new(name, size)

    def of(self, expr: sympy.Expr) -> set[sympy.Symbol]:
        return {s for s in expr.free_symbols if s in self.sizes}

    def upper(self, expr: sympy.Expr) -> sympy.Expr | None:
        """The largest value of an expression that does not fall with any axis; None where that is not evident."""
        expr = sympy.expand(expr)
        total = sympy.S.Zero
        for term in sympy.Add.make_args(expr):
            coefficient, rest = term.as_coeff_Mul()
            axes = self.of(rest)
            atoms = rest.atoms(Div, Mod)
            if not axes:
                total += term
                continue
            if coefficient < 0:
                continue  # its largest value is 0
            bound = rest
            for atom in atoms:
                top = self._atom_upper(atom)
                if top is None:
                    return None
                bound = bound.subs(atom, top)
            total += coefficient * bound.subs({a: self.sizes[a] - 1 for a in self.of(bound)})
        return sympy.expand(total)

    def _atom_upper(self, atom: sympy.Expr) -> sympy.Expr | None:
        if isinstance(atom, Mod):
            return atom.args[1] - 1
        top = self.upper(atom.args[0])
        return None if top is None else self.div(top, atom.args[1])

    def _split(self, expr: sympy.Expr, n: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """``expr = n * a + r``, moving every term that n divides into a."""
        a, r = [], []
        for term in sympy.Add.make_args(sympy.expand(expr)):
            if n.is_Integer:
                coefficient, rest = term.as_coeff_Mul()
                whole_part, over = divmod(coefficient, n)
                (r if over else a).append(term if over else whole_part * rest)
                continue
            quotient = term / n
            if sympy.fraction(quotient)[1] == 1 and not any(p.exp.is_negative for p in quotient.atoms(sympy.Pow)):
                a.append(quotient)
            else:
                r.append(term)
        return sympy.Add(*a), sympy.Add(*r)

    def _below(self, r: sympy.Expr, n: sympy.Expr) -> bool:
        top = self.upper(r)
        return top is not None and _nonnegative(n - 1 - top) and self._not_negative(r)

    def inside(self, expr: sympy.Expr, n: sympy.Expr) -> bool:
        """Whether ``0 <= expr < n`` is evident."""
        return self._below(expr, n)

    def _not_negative(self, expr: sympy.Expr) -> bool:
        return all(t.as_coeff_Mul()[0] >= 0 for t in sympy.Add.make_args(sympy.expand(expr)))

    def div(self, expr: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
        if n == 1:
            return expr
        if expr.is_Integer and n.is_Integer:
            return expr // n
        a, r = self._split(expr, n)
        if r == 0 or self._below(r, n):
            return a
        if isinstance(r, sympy.Symbol) and r in self.sizes:
            self.radices.append((r, n))
        if isinstance(r, Div):  # (x // m) // n = x // (m n)
            return a + self.div(r.args[0], r.args[1] * n)
        return a + Div(r, n)

    def mod(self, expr: sympy.Expr, n: sympy.Expr) -> sympy.Expr:
        if n == 1:
            return sympy.S.Zero
        if expr.is_Integer and n.is_Integer:
            return expr % n
        _, r = self._split(expr, n)
        if r == 0 or self._below(r, n):
            return r
        inner, unit = (r.args[0], r.args[1]) if isinstance(r, Div) else (r, sympy.S.One)
        if isinstance(inner, sympy.Symbol) and inner in self.sizes:
            self.radices.append((inner, unit * n))
        return Mod(r, n)

    def rejoined(self, expr: sympy.Expr) -> sympy.Expr:
        """``n * (x // n) + x % n = x``, for an index that was split and is merged again."""
        expr = sympy.expand(expr)
        for part in expr.atoms(Mod):
            x, n = part.args
            scale = expr.coeff(part)
            if scale != 0 and same(expr.coeff(Div(x, n)), scale * n):
                expr = sympy.expand(expr - scale * (part + n * Div(x, n)) + scale * x)
        return expr

    def rewrite(self, expr: sympy.Expr, replace: dict[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
        """`expr` with axes replaced, `//` and `%` simplified again."""
        if not expr.args:
            return replace.get(expr, expr)  # pyright: ignore[reportArgumentType]
        args = [self.rewrite(a, replace) for a in expr.args]
        if isinstance(expr, Div):
            return self.div(args[0], args[1])
        if isinstance(expr, Mod):
            return self.mod(args[0], args[1])
        return sympy.expand(expr.func(*args))


def merge_index(axes: Axes, out_shape: Sequence[Any], in_shape: Sequence[Any], index: Sequence[sympy.Expr]) -> list[sympy.Expr]:
    """Where element `index` of ``x.view(out_shape)`` lies in ``x`` of `in_shape`: dims are matched in the smallest groups.

    [B, H, N, M] -> [B*H, N, M] is two groups of one dim each and one of two, so N and M never meet a division.
    """
    outs = [(expr_of(s), i) for s, i in zip(out_shape, index, strict=True) if expr_of(s) != 1]
    ins = [(expr_of(s), j) for j, s in enumerate(in_shape) if expr_of(s) != 1]
    result = [sympy.S.Zero] * len(in_shape)
    o = i = 0
    while o < len(outs) and i < len(ins):
        group_out, group_in = [outs[o]], [ins[i]]
        o, i = o + 1, i + 1
        size_out, size_in = group_out[0][0], group_in[0][0]
        while not same(size_out, size_in) and (o < len(outs) or i < len(ins)):
            take_in = o >= len(outs) or (i < len(ins) and _divides(size_in, size_out))
            if take_in:
                group_in.append(ins[i])
                size_in, i = size_in * ins[i][0], i + 1
            else:
                group_out.append(outs[o])
                size_out, o = size_out * outs[o][0], o + 1
        linear, stride = sympy.S.Zero, sympy.S.One
        for size, position in reversed(group_out):
            linear += position * stride
            stride *= size
        linear, stride = axes.rejoined(linear), sympy.S.One
        for count, (size, j) in enumerate(reversed(group_in)):
            position = axes.div(linear, stride)
            result[j] = position if count == len(group_in) - 1 else axes.mod(position, size)
            stride *= size
    return result


def _divides(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether b is a larger number than a, or evidently a multiple of it."""
    if a.is_Integer and b.is_Integer:
        return bool(b > a)
    quotient = sympy.cancel(b / a)
    if quotient.is_number:
        return bool(quotient > 1)
    return whole(quotient)
