"""The weight of a program: what becomes of a probability between the softmax and its product with the values.

A weight is an expression whose leaf ``score`` stands for the probability p. It has to be linear in p wherever p is a number, for
the kernels apply it to exp(x - max), which is p but for a factor of the row, and to p after its dropout:

    p w                  a mask of ones and zeros, of heads, of rows: NaN stays NaN, 0 inf is NaN
    where(c, p, 0)       a mask that is applied again: NaN is stopped with the rest
    where(isnan(p), 0, p)    a guard

w and c read positions and captured tensors alone. The backward needs no rule of its own: the cotangent of p is what `derivative`
makes of the cotangent of the result.
"""

from __future__ import annotations

from functools import lru_cache

from .nodes import SCORE, Node

__all__ = ["is_weight", "selects"]


@lru_cache(maxsize=4096)
def is_weight(node: Node) -> bool:
    """Whether `node` is a float expression of the forms above, and of these under one another."""
    if node is SCORE:
        return True
    if node.op == "neg":
        return is_weight(node.args[0])
    if node.op in ("mul", "div"):
        a, b = node.args
        return (_free(b) and is_weight(a)) or (node.op == "mul" and _free(a) and is_weight(b))
    if node.op != "where":
        return _is_zero(node)
    p, a, b = node.args
    if p.op == "isnan":  # what is NaN may become 0, and nothing else
        return is_weight(p.args[0]) and _is_zero(a) and is_weight(b)
    return _free(p) and is_weight(a) and is_weight(b)


@lru_cache(maxsize=4096)
def selects(node: Node) -> bool:
    """Whether a NaN may become a number: 0, for there is no other that a weight makes of it."""
    return node.op == "where" or _is_zero(node) or any(selects(a) for a in node.args if not _free(a))


def _free(node: Node) -> bool:
    return not node.depends_on("score", "grad")


def _is_zero(node: Node) -> bool:
    return node.op == "const" and node.kind == "float" and node.attr == 0
