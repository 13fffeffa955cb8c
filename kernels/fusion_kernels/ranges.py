"""Where, over a tile, does a predicate hold: somewhere, everywhere? Comparisons of indices, solved for one of them.

Each comparison is made linear in its indices and solved for the key (or the row), with the other index at the end of the tile
that keeps the answer sound; ``floordiv``, ``abs``, ``maximum`` and ``minimum`` are inverted; ``and`` and ``or`` are
intersections and unions of ranges. An expression outside these forms gets the conservative answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .program import Node, apply, const, index, size

__all__ = ["Range", "Solver", "inequality", "linear"]

BIG = 2**30  # integer constants are cut here: no index reaches it, and tile arithmetic must not overflow 32 bits


def _not(node: Node) -> Node:
    return apply("not", node)


@dataclass(frozen=True)
class Range:
    lo: Node
    hi: Node  # half-open; empty where hi <= lo


def _min(a: Node, b: Node) -> Node:
    return a if a is b else apply("minimum", a, b)


def _max(a: Node, b: Node) -> Node:
    return a if a is b else apply("maximum", a, b)


def _intersect(a: Range, b: Range) -> Range:
    return Range(_max(a.lo, b.lo), _min(a.hi, b.hi))


def _pick(p: Node, a: Range, b: Range) -> Range:
    return Range(apply("where", p, a.lo, b.lo), apply("where", p, a.hi, b.hi))


def _empty(a: Range) -> Node:
    return apply("ge", a.lo, a.hi)


def _hull(a: Range, b: Range) -> Range:
    both = Range(_min(a.lo, b.lo), _max(a.hi, b.hi))
    return _pick(_empty(a), b, _pick(_empty(b), a, both))


def _union(a: Range, b: Range) -> Range:
    """Both, where they meet; else the longer one (a smaller answer is sound where this is asked)."""
    meet = apply("and", apply("le", a.lo, b.hi), apply("le", b.lo, a.hi))
    longer = apply("ge", apply("sub", a.hi, a.lo), apply("sub", b.hi, b.lo))
    proper = apply("and", meet, _not(apply("or", _empty(a), _empty(b))))
    return _pick(proper, Range(_min(a.lo, b.lo), _max(a.hi, b.hi)), _pick(longer, a, b))


@dataclass(frozen=True)
class _Linear:
    """The sum of coefficient * term, plus a constant; a term is an integer expression that is not itself a sum."""

    terms: tuple[tuple[Node, int], ...] = ()
    rest: int = 0

    def plus(self, other: _Linear, times: int = 1) -> _Linear:
        """``self + times * other``; coefficients beyond 2^15 would overflow in a kernel."""
        terms = dict(self.terms)
        for term, c in other.terms:
            terms[term] = terms.get(term, 0) + times * c
        if any(abs(c) > 2**15 for c in terms.values()):
            raise _Unknown
        return _Linear(tuple((t, c) for t, c in terms.items() if c), self.rest + times * other.rest)

    @property
    def node(self) -> Node:
        """The expression again, written as one would, its constant cut to what 32 bits hold."""
        out, rest = const(0), max(-BIG, min(BIG, self.rest))
        for term, c in sorted(self.terms, key=lambda t: t[1] < 0):
            scaled = apply("mul", term, const(abs(c)))
            out = apply("add" if c > 0 else "sub", out, scaled) if c > 0 or out is not const(0) else apply("neg", scaled)
        if not self.terms:
            return const(rest)
        return apply("add", out, const(rest)) if rest >= 0 else apply("sub", out, const(-rest))


class _Unknown(Exception):
    """The expression is outside the forms that are solved: the caller falls back to the conservative answer."""


def _linear(node: Node) -> _Linear:
    if node.op == "to_float" and node.args[0].kind == "int":
        return _linear(node.args[0])  # exact below 2^24, and no index of a real tile is larger
    if node.op == "const":
        value = node.attr
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise _Unknown
        if math.isinf(value):
            return _Linear(rest=int(math.copysign(2**60, value)))  # beyond any index
        if value != int(value):
            raise _Unknown
        return _Linear(rest=int(value))
    if node.op in ("add", "sub"):
        a, b = (_linear(x) for x in node.args)
        return a.plus(b, 1 if node.op == "add" else -1)
    if node.op == "neg":
        return _Linear().plus(_linear(node.args[0]), -1)
    if node.op == "mul":
        a, b = (_linear(x) for x in node.args)
        for factor, other in ((a, b), (b, a)):
            if not factor.terms:
                return _Linear().plus(other, factor.rest)
    if node.kind != "int":
        raise _Unknown
    return _Linear(((node, 1),))


def _difference(op: str, a: Node, b: Node) -> _Linear:
    """The linear expression that is at most 0 where ``a op b``, an inequality of integers."""
    if op in ("ge", "gt"):
        a, b = b, a
    difference = _linear(a).plus(_linear(b), -1)  # a <= b is a - b <= 0; a < b is a - b + 1 <= 0
    return difference.plus(_Linear(rest=int(op in ("lt", "gt"))))


def inequality(p: Node, positive: bool = True) -> tuple[dict[Node, int], int] | None:
    """A comparison of integers, or its negation, in normal form: ({term: c}, bound) for ``sum of c * term <= bound``.

    None where it is an equality, or not linear. The terms are indices, parameters, sizes, and what is not a sum of them.
    """
    if p.op == "not":
        return inequality(p.args[0], not positive)
    if p.op not in _COMPARE or any(a.kind == "bool" for a in p.args):
        return None
    op = p.op if positive else _NEGATED[p.op]
    try:
        linear = _difference(op, *p.args) if op not in ("eq", "ne") else None
    except _Unknown:
        return None
    return None if linear is None else (dict(linear.terms), -linear.rest)


def linear(node: Node) -> tuple[dict[Node, int], int] | None:
    """An integer expression as ({term: c}, rest), for ``sum of c * term + rest``; None where it is not linear."""
    try:
        found = _linear(node)
    except _Unknown:
        return None
    return dict(found.terms), found.rest


def _over(a: _Linear, c: int) -> _Linear:
    """floor(a / c), c > 0."""
    if c == 1:
        return a
    if not a.terms:
        return _Linear(rest=a.rest // c)
    if abs(a.rest) > BIG:
        raise _Unknown
    return _linear(apply("floordiv", a.node, const(c)))


def _interval(node: Node, ends: Mapping[str, tuple[Node, Node]]) -> tuple[Node, Node]:
    """The least and the largest value of an integer expression while each index of `ends` runs over its tile."""
    if not node.depends_on("q", "k"):
        return node, node
    if node.op == "index":
        return ends[node.attr]  # type: ignore[index]
    if node.op in ("add", "sub", "neg", "mul"):
        linear = _linear(node)
        lo = hi = _Linear(rest=linear.rest)
        for term, c in linear.terms:
            if term is node:
                raise _Unknown  # a product of indices
            a, b = _interval(term, ends)
            a, b = (a, b) if c > 0 else (b, a)
            lo, hi = lo.plus(_linear(a), c), hi.plus(_linear(b), c)
        return lo.node, hi.node
    if node.op == "floordiv" and not node.args[1].depends_on("q", "k"):
        a, b = _interval(node.args[0], ends)
        return apply("floordiv", a, node.args[1]), apply("floordiv", b, node.args[1])
    if node.op == "mod" and not node.args[1].depends_on("q", "k"):
        return const(0), _linear(node.args[1]).plus(_Linear(rest=-1)).node
    if node.op in ("maximum", "minimum"):
        (a, b), (c, d) = (_interval(x, ends) for x in node.args)
        return apply(node.op, a, c), apply(node.op, b, d)
    if node.op == "abs":
        a, b = _interval(node.args[0], ends)
        return _max(const(0), _max(a, apply("neg", b))), _max(apply("neg", a), b)
    raise _Unknown


class Solver:
    """Solves predicates for one index (`over`, "k" or "q") while the other (`tile`) runs over a tile."""

    def __init__(self, over: str, tile: str) -> None:
        self.over = over
        self.ends = {tile: (index(tile + "0"), index(tile + "1"))}
        self.all = Range(const(0), size("M" if over == "k" else "N"))
        self.none = Range(const(0), const(0))

    def solve(self, p: Node, some: bool, positive: bool = True) -> Range:
        """Where `p` (or its negation) can hold for some row of the tile; or, not `some`, where it holds for every row."""
        if p.op == "not":
            return self.solve(p.args[0], some, not positive)
        if p.op == "const":
            return self.all if p.attr == positive else self.none
        if p.op in ("and", "or"):
            a, b = (self.solve(x, some, positive) for x in p.args)
            if (p.op == "and") == positive:
                return _intersect(a, b)
            return self._either(a, b, some)
        if p.op == "where":
            c, a, b = p.args
            flat = apply("or", apply("and", c, a), apply("and", _not(c), b))
            return self.solve(flat, some, positive)
        if p.op in _COMPARE and all(a.kind != "bool" for a in p.args):
            try:
                return self._compare(p.op if positive else _NEGATED[p.op], *p.args, some=some)
            except _Unknown:
                pass
        return self.all if some else self.none

    def _compare(self, op: str, a: Node, b: Node, some: bool) -> Range:
        if op == "eq":
            return _intersect(self._compare("le", a, b, some), self._compare("ge", a, b, some))
        if op == "ne":
            less, more = self._compare("lt", a, b, some), self._compare("gt", a, b, some)
            return self._either(less, more, some)
        return self._at_most(_difference(op, a, b), some)

    def _at_most(self, linear: _Linear, some: bool) -> Range:
        """Where ``linear <= 0``, for some or for every row of the tile."""
        bound = _Linear(rest=-linear.rest)
        mine = []
        for term, c in linear.terms:
            if term.depends_on(self.over):
                mine.append((term, c))
                continue
            lo, hi = _interval(term, self.ends)
            bound = bound.plus(_linear(lo if (c > 0) == some else hi), -c)
        if not mine:
            return _pick(apply("ge", bound.node, const(0)), self.all, self.none)
        if len(mine) > 1:
            raise _Unknown
        ((term, c),) = mine
        if c > 0:
            return self._below(term, _over(bound, c), some)  # c t <= B is t <= floor(B / c)
        return self._above(term, _Linear().plus(_over(bound, -c), -1), some)  # -c t <= B is t >= -floor(B / c)

    def _below(self, term: Node, bound: _Linear, some: bool) -> Range:
        """Where ``term <= bound``."""
        if term.op == "index":
            return Range(const(0), _min(bound.plus(_Linear(rest=1)).node, self.all.hi))
        if term.op == "floordiv" and not term.args[1].depends_on("q", "k"):  # x // d <= t is x <= (t + 1) d - 1
            end = _linear(apply("mul", bound.plus(_Linear(rest=1)).node, term.args[1]))
            return self._at_most(_linear(term.args[0]).plus(end, -1).plus(_Linear(rest=1)), some)
        x = [_linear(a) for a in term.args]
        if term.op == "abs":  # -t <= x <= t
            over, under = x[0].plus(bound, -1), _Linear().plus(x[0], -1).plus(bound, -1)
            return _intersect(self._at_most(over, some), self._at_most(under, some))
        if term.op in ("maximum", "minimum"):
            a, b = (self._at_most(y.plus(bound, -1), some) for y in x)
            return _intersect(a, b) if term.op == "maximum" else self._either(a, b, some)
        raise _Unknown

    def _above(self, term: Node, bound: _Linear, some: bool) -> Range:
        """Where ``term >= bound``."""
        if term.op == "index":
            return Range(_max(bound.node, const(0)), self.all.hi)
        if term.op == "floordiv" and not term.args[1].depends_on("q", "k"):  # x // d >= t is x >= t d
            start = _linear(apply("mul", bound.node, term.args[1]))
            return self._at_most(start.plus(_linear(term.args[0]), -1), some)
        x = [_linear(a) for a in term.args]
        if term.op == "abs":  # x >= t or x <= -t
            return self._either(self._at_most(bound.plus(x[0], -1), some), self._at_most(x[0].plus(bound), some), some)
        if term.op in ("maximum", "minimum"):
            a, b = (self._at_most(bound.plus(y, -1), some) for y in x)
            return _intersect(a, b) if term.op == "minimum" else self._either(a, b, some)
        raise _Unknown

    def _either(self, a: Range, b: Range, some: bool) -> Range:
        return _hull(a, b) if some else _union(a, b)


_COMPARE = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
