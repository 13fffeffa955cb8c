"""A score program as the arguments of scaled_dot_product_attention, where it is one: ATen's kernels can then compute it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from .float16_sums import inside
from .masks import ABSORBING
from .program import SCORE, Node, Program, apply, const, index
from .ranges import inequality

__all__ = ["Form", "form"]

K, Q = index("k"), index("q")
HIDDEN = -1e9  # a `where` constant at or below this is as good as -inf beside any visible key, and absorbs a score in fp32


@dataclass(frozen=True)
class Form:
    """A program as ``scale * s + mask``, with ``causal``: k <= q. mask: a float expression without the score, or None."""

    scale: float
    causal: bool
    mask: Node | None


def _scale(node: Node) -> float | None:
    if node is SCORE:
        return 1.0
    if node.op == "mul":
        for a, b in (node.args, node.args[::-1]):
            inner = _scale(a) if b.op == "const" else None
            if inner is not None:
                return inner * float(b.attr)  # type: ignore[arg-type]
    if node.op == "div" and node.args[1].op == "const":
        inner = _scale(node.args[0])
        return None if inner is None else inner / float(node.args[1].attr)  # type: ignore[arg-type]
    return None


def _is_causal(p: Node, positive: bool) -> bool:
    """Whether `p`, or its negation, says k - q <= 0 of whole numbers: c (k - q) <= d is k - q <= floor(d / c), for c > 0."""
    found = inequality(p, positive)
    if found is None:
        return False
    terms, bound = found
    c = terms.get(K, 0)
    return c > 0 and terms == {K: c, Q: -c} and bound // c == 0


def _visible(p: Node, positive: bool = True) -> tuple[bool, Node | None]:
    """A condition of visibility, `p` or its negation, as (causal, what else has to hold)."""
    if p.op == "not":
        return _visible(p.args[0], not positive)
    if p.op == ("and" if positive else "or"):
        (ca, a), (cb, b) = (_visible(x, positive) for x in p.args)
        return ca or cb, apply("and", a, b) if a is not None and b is not None else a if a is not None else b
    return (True, None) if _is_causal(p, positive) else (False, p if positive else apply("not", p))


def _added(term: Node) -> tuple[bool, Node | None]:
    """An added mask as (causal, what else is added): ``where(visible, 0, c)``, where c takes any score with it."""
    if term.op != "where" or term.args[1].op != "const" or term.args[2].op != "const":
        return False, term
    p, a, b = term.args
    if a.attr != 0:
        p, a, b = apply("not", p), b, a
    if a.attr != 0 or not b.attr <= ABSORBING:  # type: ignore[operator]
        return False, term
    causal, rest = _visible(p)
    return (True, None if rest is None else apply("where", rest, a, b)) if causal else (False, term)


@lru_cache(maxsize=1024)
def form(program: Program) -> Form | None:
    """How ATen would compute the program; None if it cannot."""
    if program.sink is not None or program.weight is not None:
        return None
    root, causal = program.root, False
    mask: Node | None = None
    while (scale := _scale(root)) is None:
        if (whole := inside(root)) is not None:  # rows that a mask hides whole are not ATen's; others only lose by rounding
            root = whole
            continue
        if root.op == "add":
            a, b = root.args
            root, term = (a, b) if a.depends_on("score") else (b, a)
            now_causal, term = _added(term)
            causal |= now_causal
        elif root.op == "where":
            p, a, b = root.args
            if b.op != "const":
                p, a, b = apply("not", p), b, a
            if b.op != "const" or not _hides(b, mask) or p.depends_on("score"):
                return None
            root = a
            now_causal, rest = _visible(p)
            causal |= now_causal
            term = None if rest is None else apply("where", rest, const(0.0), const(-math.inf))
        else:
            return None
        if term is not None and term.depends_on("score"):
            return None
        if term is not None:
            mask = term if mask is None else apply("add", term, mask)
    return Form(scale, causal, mask) if math.isfinite(scale) else None


def _hides(constant: Node, added: Node | None) -> bool:
    """Whether a `where` to this constant hides the key; a finite one might not if something is `added` to it afterwards."""
    value = float(constant.attr)  # type: ignore[arg-type]
    return value == -math.inf or (value <= HIDDEN and added is None)
