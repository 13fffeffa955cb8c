"""When is an element of the score dead, whatever its tensors hold? Read from the expression alone.

Each structural predicate (a comparison of indices, sizes and parameters; no tensor) is replaced by True and by False. Where the
result folds to a mask constant, the predicate decides. Conjunctions, disjunctions, nested ``where``, added and multiplied
masks, ``minimum`` of masks are all the same case. So is padding: a predicate of tensors that are read at (b, h, k) decides
about whole keys. Which keys, only its tensors say (`key_split`, `key_ranges`). And so are documents, and masks that come
ready-made: predicates of tensors that are read at q and k, and numbers that are added to the score (`pair_split`, `pair_ranges`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .program import Node, apply, const, postorder, rebuild

__all__ = ["Split", "key_split", "pair_split", "split"]

MASK = -1000.0  # a constant at or below this, chosen in place of a score, is a mask
ABSORBING = -1e30  # a constant at or below this absorbs any score that it is added to
TRUE, FALSE = const(True), const(False)


@dataclass(frozen=True)
class Split:
    dead: Node  # bool: the element contributes nothing
    fill: float  # the largest score that such an element can have
    live: Node  # the result where plain
    plain: Node  # bool: not dead; nor, where a number is added (`graded`), anything between dead and nothing added
    graded: bool = False


def _structural(node: Node) -> bool:
    """Whether `node` is about positions: it reads q or k, and no tensor."""
    return not any(leaf.op in ("score", "load", "grad") for leaf in node.leaves) and node.depends_on("q", "k")


def _about_keys(node: Node) -> bool:
    """Whether `node` is about whole keys, as tensors have it: it reads k and a tensor, neither q nor the score."""
    return node.depends_on("k") and node.depends_on("load") and not node.depends_on("q", "score", "grad")


def _predicates(root: Node, fits: Callable[[Node], bool]) -> list[Node]:
    """The largest bool expressions below `root` that fit, outermost first, without their negations."""
    found: dict[Node, None] = {}
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        if node.kind == "bool" and node.op not in ("not", "const") and fits(node):
            found[node] = None
            continue
        for a in node.args:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return list(found)


def _about_pairs(node: Node) -> bool:
    """Whether `node` says the same wherever it is asked: it does not read the score, nor a sum that one kernel rounds once, and
    another one twice (x * y + z)."""
    if node.depends_on("score", "grad"):
        return False
    sums = (n for n in postorder(node) if n.kind == "float" and n.op in ("add", "sub"))
    return not any(a.op == "mul" for n in sums for a in n.args)


def _terms(root: Node, learned: Collection[int]) -> list[Node]:
    """What may be a mask that is added: the float expressions of tensors and positions beside the score, sums taken apart, that
    read neither h (what differs from head to head is a bias) nor a capture of `learned`."""
    found: dict[Node, None] = {}
    stack, seen = [root], {root}
    while stack:
        for a in stack.pop().args:
            if a.kind != "float" or a in seen:
                continue
            seen.add(a)
            if a.op in ("add", "sub") or a.depends_on("score", "grad"):
                stack.append(a)
            elif a.depends_on("load") and a.depends_on("q", "k") and not a.depends_on("h"):
                found[a] = None
    return [a for a in found if not any(leaf.op == "load" and leaf.attr in learned for leaf in a.leaves)]


def _mask_value(root: Node, known: Mapping[Node, float] | None = None) -> float | None:
    """An upper bound of `root` if it makes a mask of it, whatever score and tensors hold (barring NaN, +inf); else None.

    known: upper bounds of nodes, beside what follows from the expression.
    """
    bounds: dict[Node, float | None] = dict(known or {})
    for node in postorder(root):
        if node not in bounds:
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
        return min(known, default=None) if all(map(_ordinary, node.args)) else None
    if node.op == "add" and len(known) == 1:
        return known[0] if known[0] <= ABSORBING and all(map(_ordinary, node.args)) else None
    if node.op == "sub" and args[0] is not None:
        if node.args[1].op == "const" and args[1] is not None:
            return args[0] - args[1]
        return args[0] if args[0] <= ABSORBING and not _infinite(node.args[1]) else None
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


def _infinite(node: Node) -> bool:
    """Whether a constant below `node` is infinite or NaN."""
    return any(leaf.op == "const" and not math.isfinite(leaf.attr) for leaf in node.leaves)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _ordinary(node: Node) -> bool:
    """Whether `node` makes no NaN and no +inf by itself: -inf is only chosen or added in it, never multiplied (by 0, say)."""
    if node.op == "const":
        return node.attr < math.inf  # type: ignore[operator]
    if node.op in ("where", "add", "maximum", "minimum"):
        return all(_ordinary(a) for a in node.args if a.kind == "float")
    return not _infinite(node)


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


def _alone(root: Node, predicates: Sequence[Node]) -> tuple[Split, list[Node]] | None:
    """What the predicates decide each by itself (conjunctions), and those that decide nothing; None: one decides both ways."""
    dead, worst, live = FALSE, -math.inf, root
    undecided = []
    for p in predicates:
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
    return Split(dead, worst, live, _not(dead)), undecided


def _decided(root: Node, fits: Callable[[Node], bool]) -> Split | None:
    """What the predicates that fit decide, each by itself or a few together; None if they decide nothing."""
    found = _alone(root, _predicates(root, fits))
    if found is None:
        return None
    dead, worst, live = found[0].dead, found[0].fill, found[0].live
    undecided = [p for p in found[1] if p in set(postorder(live))]
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
    return None if dead is FALSE else Split(dead, worst, live, _not(dead))


@lru_cache(maxsize=1024)
def split(root: Node) -> Split | None:
    """`root` as "dead here, `live` elsewhere"; None if no structural predicate decides."""
    return _decided(root, _structural)


@lru_cache(maxsize=1024)
def key_split(root: Node) -> Split | None:
    """`root` as "dead at these keys, `live` at the others", by predicates of tensors alone; None if none decides."""
    found = _alone(root, _predicates(root, _about_keys))
    return None if found is None or found[0].dead is FALSE else found[0]


@lru_cache(maxsize=1024)
def pair_split(root: Node, learned: tuple[int, ...] = ()) -> Split | None:
    """`root` as "dead at these (q, k), `live` where plain", by whatever tensors say; None if they decide nothing.

    A number from a tensor that is added to the score is dead where it is at most ABSORBING, and plain where it is 0.

    Args:
        learned: the captures whose gradients are wanted, which every element that is not dead has a part in.
    """
    found = _decided(root, _about_pairs) or Split(FALSE, -math.inf, root, TRUE)
    dead, worst, live, plain = found.dead, found.fill, found.live, found.plain
    for term in _terms(live, learned):
        bound = _mask_value(live, {term: ABSORBING})
        if bound is None:
            continue
        dead, worst = apply("or", dead, apply("le", term, const(ABSORBING))), max(worst, bound)
        plain = apply("and", plain, apply("eq", term, const(0.0)))
        live = _assume(live, {term: const(0.0)})
    return Split(dead, worst, live, plain, plain is not found.plain) if dead.depends_on("load") else None
