"""Float expressions as kernels want them: constant factors together and outside, and how large a score can be."""

from __future__ import annotations

import math

from .program import Node, apply, const, rebuild
from .source import index_axes

__all__ = ["canonical", "peel", "reaches"]


def canonical(root: Node) -> Node:
    """Division of a score by a constant as a product, and two constant factors as one: within an ulp of the original."""

    def replace(node: Node, args: tuple[Node, ...]) -> Node | None:
        if node.op not in ("mul", "div") or node.kind != "float" or not node.depends_on("score", "grad"):
            return None
        x, c = args if args[1].op == "const" or node.op == "div" else args[::-1]
        factor = _factor(c)
        if factor is None:
            return None
        factor = 1.0 / factor if node.op == "div" else factor
        inner = _factor(x.args[1]) if x.op == "mul" else None
        if inner is not None and _ordinary(inner * factor):
            x, factor = x.args[0], inner * factor
        return apply("mul", x, const(factor))

    return rebuild(root, replace)


def _ordinary(value: float) -> bool:
    return 1e-30 < abs(value) < 1e30


def _factor(node: Node) -> float | None:
    """The value of a float constant that is neither 0 nor near the ends of fp32."""
    return float(node.attr) if node.op == "const" and isinstance(node.attr, float) and _ordinary(node.attr) else None


def peel(root: Node, mask: float, positive: bool) -> tuple[Node, float]:
    """(inner, c) with root = c * inner, where `mask` (-inf or 0) times c is itself: the factor moves out of the inner loop."""
    c = _factor(root.args[1]) if root.op == "mul" else None
    if c is not None and (c > 0 or not positive):
        return root.args[0], c
    if root.op == "where":
        p, a, b = root.args
        masked = [x.op == "const" and x.attr == mask for x in (a, b)]
        if masked[1]:
            inner, c = peel(a, mask, positive)
            return apply("where", p, inner, b), c
        if masked[0]:
            inner, c = peel(b, mask, positive)
            return apply("where", p, a, inner), c
    return root, 1.0


def reaches(root: Node, size: float) -> bool:
    """Whether a masked score can be finite and beyond `size`: through a constant, a tensor read along q or k, or one added."""
    added = _added(root)
    for leaf in root.leaves:
        if leaf.op == "const" and leaf.kind == "float" and math.isfinite(leaf.attr) and abs(leaf.attr) >= size:  # type: ignore[arg-type]
            return True
        if leaf.op == "load" and leaf.kind == "float" and (leaf in added or any(index_axes(leaf))):
            return True
    return False


_SUMS = frozenset({"add", "sub", "neg", "where", "maximum", "minimum", "round_float16", "round_bfloat16"})


def _added(root: Node) -> set[Node]:
    """The nodes whose value is a term of the result: a slope of ALiBi is a factor, a mask of whole heads a term."""
    found, todo = {root}, [root]
    while todo:
        node = todo.pop()
        new = [a for a in node.args if node.op in _SUMS and a not in found]
        found.update(new)
        todo += new
    return found
