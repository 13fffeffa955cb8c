"""What float16 keeps of a score that a mask is added to.

A sum is rounded to its dtype, and beside a large number a score has no digits left. In fp32 and bfloat16 the numbers that masks
are made of (-1e9, finfo.min) absorb it whole, in the kernels as in eager. In float16 they reach 65504, which fp32 still adds a
score to: of a row that ``s + finfo(float16).min`` hides whole, eager has -65504 everywhere (or -inf, for s <= -16) and so the
mean of all values, where fp32 would have softmax(s). So such a sum is rounded where it is large, and left alone elsewhere,
where rounding would only add error.
"""

from __future__ import annotations

from .program import Node, apply, const

__all__ = ["LARGE", "inside", "rounded"]

LARGE = 4096.0  # from here on float16 numbers lie 4 and more apart


def rounded(x: Node) -> Node:
    """``x``, a sum, as float16 has it where it is large; its gradient is that of ``x``."""
    return apply("where", apply("lt", apply("abs", x), const(LARGE)), x, apply("round_float16", x))


def inside(node: Node) -> Node | None:
    """The sum that `rounded` has made `node` of; None if it has not."""
    if node.op != "where" or node.args[2].op != "round_float16":
        return None
    x = node.args[2].args[0]
    return x if node is rounded(x) else None
