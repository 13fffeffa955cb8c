"""Queries, keys and values: each found below the views, casts and copies that lead from it to its product.

A copy is not made again: the factor is the deepest value from which plain views lead to (batch, heads, length, head dim).
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from .describe import Describer
from .indexing import Axes
from .layout import Step, view_steps
from .site import Reason, Refused
from .tape import Value
from .views import COPIES

__all__ = ["Chain", "Factor", "chain_of", "factor"]

Chain = list[tuple[Value, Sequence[sympy.Expr]]]  # values on the way down, each with the index at which it is read


@dataclass
class Factor:
    """q, k or v: a value, the casts and view steps that take it to (B, heads, length, dim)."""

    value: Value
    casts: list[torch.dtype]
    steps: list[Step]
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype


def chain_of(d: Describer, value: Value, index: Sequence[sympy.Expr]) -> Chain:
    """Every value on the way down through views and casts, the factor itself first."""
    links: Chain = [(value, index)]
    while True:
        step = d.step(*links[-1])
        if step is None:
            record = links[-1][0].record
            if (
                record is None
                or d.cut(links[-1][0])
                or record.mutates
                or record.op != "_to_copy.default"
                or not record.args[0].dtype.is_floating_point
            ):
                return links
            step = (record.args[0], links[-1][1])
        links.append(step)


def factor(axes: Axes, what: str, links: list, groups: tuple[list[sympy.Symbol], ...]) -> Factor:
    """The value below the deepest copy from which views lead to `groups`; further up the chain where there are none."""
    copies = [i for i, (v, _) in enumerate(links) if v.record is not None and v.record.op in COPIES]
    start = min(copies[-1] + 1, len(links) - 1) if copies else 0
    below, above = range(start, len(links)), range(start - 1, -1, -1)
    held = [i for i in below if links[i][0].node is not None]  # not inside a composite call: nothing is computed twice
    for i in [*held, *below, *above]:
        value, index = links[i]
        steps = view_steps(axes, value.shape, index, groups)
        if steps is None:
            continue
        casts = [v.dtype for v, _ in reversed(links[:i]) if v.record is not None and v.record.op == "_to_copy.default"]
        shape = tuple(sympy.Mul(*(axes.sizes[a] for a in g)) for g in groups)
        return Factor(value, casts, steps, shape, links[0][0].dtype)
    raise Refused(Reason.LAYOUT, f"{what} read at {tuple(links[0][1])}", "whole dims, merged or split")
