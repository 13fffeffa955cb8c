"""The largest score of a row, which hand-written softmaxes subtract: recognised whether gradients flow through it or not."""

from __future__ import annotations

import sympy
from fusion_kernels.program import Node

from .describe import Describer

__all__ = ["is_row_maximum"]


def is_row_maximum(d: Describer, node: Node, body: Node, axis: sympy.Symbol) -> bool:
    """Whether `node` is the largest value of `body` along `axis`; it, or what it is taken of, may be detached."""
    node = d.beyond(node)
    if node.op != "amax":
        return False
    replace: dict[sympy.Symbol, sympy.Expr] = {node.attr[0]: axis}  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    return body in (d.substitute(of, replace) for of in (node.args[0], d.beyond(node.args[0])))
