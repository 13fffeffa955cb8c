"""What a score program proves about its mask: which keys a tile of queries can skip, and where no mask is needed.

Two questions, both answered from the expression alone, before any tensor has a value:

1. When is an element *dead*? Each structural predicate (a comparison of indices, sizes and parameters; no tensor) is replaced
   by True and by False; where the result folds to a mask constant, the predicate decides. Conjunctions, disjunctions, nested
   ``where``, additive and multiplied masks, ``minimum`` of masks are all the same case. `full_program` is the program with
   the deciding predicates at their live value.
2. Where, in a tile, is nothing (everything) alive? Each comparison is made linear in its indices and solved for the key, with
   the row at the end of the tile that keeps the answer sound; ``and``/``or`` become intersections and unions of ranges.

An expression outside these forms is never skipped: the answers are conservative, not guessed.

A skipped element is worth exactly 0 while its row has a visited score of at least ``fill + 128``, because
exp(-128) < 2^-149 / 2 rounds to zero in fp32 (with the sum at least 1). A row without one has to visit every key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from .program import Node, Program, apply, const, index, postorder, rebuild, size

__all__ = ["Bounds", "fill", "full_program", "kv_bounds", "q_bounds"]

MASK = -1000.0  # a constant at or below this, chosen in place of a score, is a mask
ABSORBING = -1e30  # a constant at or below this absorbs any score that it is added to
TRUE, FALSE = const(True), const(False)
BIG = 2**30  # integer constants are cut here: no index reaches it, and tile arithmetic must not overflow 32 bits


@dataclass(frozen=True)
class Bounds:
    """Half-open ranges for a tile, as integer expressions; not clamped to the sequence, possibly empty (hi <= lo).

    Outside [lo, hi) every element is dead for every row of the tile. Inside [full_lo, full_hi) every element is alive as
    far as structure goes: `full_program` gives its score.
    """

    lo: Node
    hi: Node
    full_lo: Node
    full_hi: Node


# ---------------------------------------------------------------- 1. when is an element dead


@dataclass(frozen=True)
class _Split:
    dead: Node  # bool: the element contributes nothing
    fill: float  # the largest score that such an element can have
    live: Node  # the result where not dead


def _structural(node: Node) -> bool:
    return not any(leaf.op in ("score", "load", "grad") for leaf in node.leaves)


def _predicates(root: Node) -> list[Node]:
    """The largest structural bool expressions below `root` that read q or k, outermost first, without their negations."""
    found: dict[Node, None] = {}
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        if node.kind == "bool" and node.op not in ("not", "const", "load") and _structural(node) and node.depends_on("q", "k"):
            found[node] = None
            continue
        for a in node.args:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return list(found)


def _mask_value(root: Node) -> float | None:
    """An upper bound of `root` if it makes a mask of it, whatever score and tensors hold (barring NaN, +inf); else None."""
    bounds: dict[Node, float | None] = {}
    for node in postorder(root):
        bounds[node] = _upper(node, [bounds[a] for a in node.args])
    bound = bounds[root]
    return bound if bound is not None and bound <= MASK else None


def _upper(node: Node, args: list[float | None]) -> float | None:
    """A number that `node` does not exceed, given such numbers for its arguments; None: none is known."""
    if node.op == "const" and node.kind == "float":
        return None if math.isnan(node.attr) else node.attr  # type: ignore[arg-type, return-value]
    if node.op in ("tanh", "sigmoid", "sin", "cos", "erf"):
        return 1.0
    known = [a for a in args if a is not None]
    if node.op == "minimum":
        return min(known, default=None)
    if node.op == "add" and len(known) == 1:
        return known[0] if known[0] <= ABSORBING else None
    if node.op == "sub" and args[0] is not None:
        exact = node.args[1].op == "const" and args[1] is not None
        return args[0] - args[1] if exact else args[0] if args[0] <= ABSORBING else None  # type: ignore[operator]
    if node.op in ("mul", "div"):
        return _scaled(node, args)
    if node.op == "where":
        args = args[1:]
    if not known or None in args:
        return None
    if node.op == "add":
        return sum(known)
    if node.op in ("maximum", "where"):
        return max(known[-2:])
    if node.op in ("round_float16", "round_bfloat16"):  # rounding to 16 bits moves a value by at most 2^-8 of it
        return known[0] * (1 - math.copysign(2**-8, -known[0]))
    return None


def _finite(node: Node) -> bool:
    """Whether 0 times `node` is 0: it reads only the score and moderate constants, through operations without poles."""
    if node.op == "const":
        return abs(float(node.attr)) < -ABSORBING  # type: ignore[arg-type]
    kept = node.op in ("score", "add", "sub", "mul", "neg", "tanh", "sigmoid", "where", "maximum", "minimum")
    return kept and all(_finite(a) for a in node.args if a.kind == "float")


def _scaled(node: Node, args: list[float | None]) -> float | None:
    for value, factor in ((args[0], node.args[1]), *([(args[1], node.args[0])] if node.op == "mul" else [])):
        if factor.op != "const":
            continue
        c = float(factor.attr)  # type: ignore[arg-type]
        if c == 0 and node.op == "mul" and _finite(node):
            return 0.0
        if value is not None and 0 < c < math.inf:
            return value * c if node.op == "mul" else value / c
    return None


def _assume(root: Node, facts: Mapping[Node, Node]) -> Node:
    return rebuild(root, lambda node, args: facts.get(node)) if facts else root


def _not(node: Node) -> Node:
    return apply("not", node)


@lru_cache(maxsize=1024)
def _split(root: Node) -> _Split | None:
    """`root` as "dead here, `live` elsewhere"; None if no structural predicate decides."""
    dead, worst, live = FALSE, -math.inf, root
    undecided = []
    for p in _predicates(root):  # each alone: conjunctions
        fills = {v: _mask_value(_assume(root, {p: v})) for v in (TRUE, FALSE)}
        kills = [v for v in (TRUE, FALSE) if fills[v] is not None]
        if len(kills) == 2:
            return None  # dead everywhere: nothing to tell apart
        if not kills:
            undecided.append(p)
            continue
        dead = apply("or", dead, p if kills[0] is TRUE else _not(p))
        worst = max(worst, fills[kills[0]])  # type: ignore[type-var]
        live = _assume(live, {p: _not(kills[0])})
    undecided = [p for p in undecided if p in set(postorder(live))]
    if 2 <= len(undecided) <= 4:  # together: disjunctions spread over several nodes
        alive = set()
        for values in itertools.product((TRUE, FALSE), repeat=len(undecided)):
            facts = dict(zip(undecided, values, strict=True))
            outcome = _assume(live, facts)
            value = _mask_value(outcome)
            if value is None:
                alive.add(outcome)
                continue
            term = TRUE
            for p, v in facts.items():
                term = apply("and", term, p if v is TRUE else _not(p))
            dead, worst = apply("or", dead, term), max(worst, value)
        if len(alive) == 1:
            live = alive.pop()
    return None if dead is FALSE else _Split(dead, worst, live)


# ---------------------------------------------------------------- 2. ranges


@dataclass(frozen=True)
class _Range:
    lo: Node
    hi: Node  # half-open; empty where hi <= lo


def _min(a: Node, b: Node) -> Node:
    return a if a is b else apply("minimum", a, b)


def _max(a: Node, b: Node) -> Node:
    return a if a is b else apply("maximum", a, b)


def _intersect(a: _Range, b: _Range) -> _Range:
    return _Range(_max(a.lo, b.lo), _min(a.hi, b.hi))


def _pick(p: Node, a: _Range, b: _Range) -> _Range:
    return _Range(apply("where", p, a.lo, b.lo), apply("where", p, a.hi, b.hi))


def _empty(a: _Range) -> Node:
    return apply("ge", a.lo, a.hi)


def _hull(a: _Range, b: _Range) -> _Range:
    both = _Range(_min(a.lo, b.lo), _max(a.hi, b.hi))
    return _pick(_empty(a), b, _pick(_empty(b), a, both))


def _union(a: _Range, b: _Range) -> _Range:
    """Both, where they meet; else the longer one (a smaller answer is sound where this is asked)."""
    meet = apply("and", apply("le", a.lo, b.hi), apply("le", b.lo, a.hi))
    longer = apply("ge", apply("sub", a.hi, a.lo), apply("sub", b.hi, b.lo))
    proper = apply("and", meet, _not(apply("or", _empty(a), _empty(b))))
    return _pick(proper, _Range(_min(a.lo, b.lo), _max(a.hi, b.hi)), _pick(longer, a, b))


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
        rest = max(-BIG, min(BIG, self.rest + times * other.rest))
        return _Linear(tuple((t, c) for t, c in terms.items() if c), rest)

    @property
    def node(self) -> Node:
        """The expression again, written as one would."""
        out = const(0)
        for term, c in sorted(self.terms, key=lambda t: t[1] < 0):
            scaled = apply("mul", term, const(abs(c)))
            out = apply("add" if c > 0 else "sub", out, scaled) if c > 0 or out is not const(0) else apply("neg", scaled)
        if not self.terms:
            return const(self.rest)
        return apply("add", out, const(self.rest)) if self.rest >= 0 else apply("sub", out, const(-self.rest))


class _Unknown(Exception):
    """The expression is outside the forms that are solved: the caller falls back to the conservative answer."""


def _linear(node: Node) -> _Linear:
    if node.op == "to_float" and node.args[0].kind == "int":
        return _linear(node.args[0])  # exact below 2^24, and no index of a real tile is larger
    if node.op == "const":
        value = node.attr
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise _Unknown
        whole = max(-BIG, min(BIG, value))
        if whole != int(whole):
            raise _Unknown
        return _Linear(rest=int(whole))
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


def _over(a: _Linear, c: int) -> _Linear:
    """floor(a / c), c > 0."""
    return a if c == 1 else _linear(apply("floordiv", a.node, const(c)))


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


class _Solver:
    """Solves predicates for one index (`over`, "k" or "q") while the other (`tile`) runs over a tile."""

    def __init__(self, over: str, tile: str) -> None:
        self.over = over
        self.ends = {tile: (index(tile + "0"), index(tile + "1"))}
        self.all = _Range(const(0), size("M" if over == "k" else "N"))
        self.none = _Range(const(0), const(0))

    def solve(self, p: Node, some: bool, positive: bool = True) -> _Range:
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

    def _compare(self, op: str, a: Node, b: Node, some: bool) -> _Range:
        if op == "eq":
            return _intersect(self._compare("le", a, b, some), self._compare("ge", a, b, some))
        if op == "ne":
            less, more = self._compare("lt", a, b, some), self._compare("gt", a, b, some)
            return self._either(less, more, some)
        if op in ("ge", "gt"):
            return self._compare("le" if op == "ge" else "lt", b, a, some)
        difference = _linear(a).plus(_linear(b), -1)  # a <= b is a - b <= 0; a < b is a - b + 1 <= 0
        return self._at_most(difference.plus(_Linear(rest=int(op == "lt"))), some)

    def _at_most(self, linear: _Linear, some: bool) -> _Range:
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

    def _below(self, term: Node, bound: _Linear, some: bool) -> _Range:
        """Where ``term <= bound``."""
        if term.op == "index":
            return _Range(const(0), _min(bound.plus(_Linear(rest=1)).node, self.all.hi))
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

    def _above(self, term: Node, bound: _Linear, some: bool) -> _Range:
        """Where ``term >= bound``."""
        if term.op == "index":
            return _Range(_max(bound.node, const(0)), self.all.hi)
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

    def _either(self, a: _Range, b: _Range, some: bool) -> _Range:
        return _hull(a, b) if some else _union(a, b)


_COMPARE = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def _bounds(program: Program, over: str, tile: str) -> Bounds | None:
    split = _split(program.root)
    if split is None:
        return None
    solver = _Solver(over, tile)
    alive = _not(split.dead)
    some, every = solver.solve(alive, some=True), solver.solve(alive, some=False)
    if some == solver.all and every == solver.none:
        return None
    return Bounds(some.lo, some.hi, every.lo, every.hi)


# ---------------------------------------------------------------- the four readers


@lru_cache(maxsize=1024)
def kv_bounds(program: Program) -> Bounds | None:
    """The keys that rows q0..q1 (first and last of a query tile, inclusive) can reach; None: nothing is known.

    Reads the indices ``q0 q1 b h``, sizes and parameters.
    """
    return _bounds(program, "k", "q")


@lru_cache(maxsize=1024)
def q_bounds(program: Program) -> Bounds | None:
    """The query rows that keys k0..k1 (first and last of a key tile, inclusive) can be reached from; None: nothing is known.

    Reads the indices ``k0 k1 b h``, sizes and parameters.
    """
    return _bounds(program, "q", "k")


@lru_cache(maxsize=1024)
def full_program(program: Program) -> Program:
    """The score where every structural predicate is alive: `program` without its structural mask."""
    split = _split(program.root)
    return program if split is None else program.with_root(split.live)


@lru_cache(maxsize=1024)
def fill(program: Program) -> float:
    """An upper bound of the score that a skipped element would have; -inf if none is finite (or nothing is skipped).

    A row may skip while its largest visited score is at least ``fill + 128``. The bound is raised by 2^-10 of its size, so
    that for fills as large as ``finfo.min``, where adding 128 changes nothing, a row that met only masked elements still
    falls below it.
    """
    split = _split(program.root)
    if split is None or split.fill == -math.inf:
        return -math.inf
    return max(split.fill, split.fill * (1 - 2**-10) - 128)
