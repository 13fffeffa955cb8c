"""Which float16 sums are rounded: those of a score and what may be a mask (see `fusion_kernels.float16_sums`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fusion_kernels.float16_sums import LARGE, rounded
from fusion_kernels.program import Node

from .kinds import has_score, to_float

if TYPE_CHECKING:
    from .describe import Describer

__all__ = ["rounded_sum"]


def rounded_sum(d: Describer, total: Node, a: Node, b: Node) -> Node:
    """`total`, a float16 sum or difference of `a` and `b`, rounded where one is a score and the other may be a mask."""
    scores = [has_score(d.beyond(x)) for x in (a, b)]
    masked = scores.count(True) == 1 and _large(b if scores[0] else a)
    return rounded(to_float(total)) if masked else total


def _large(x: Node) -> bool:
    """Whether a number may reach what masks are made of: a large constant, or a tensor whose values nobody knows.

    A tensor times a position (ALiBi) is no mask.
    """
    if x.op == "const":
        return math.isfinite(x.attr) and abs(x.attr) >= LARGE  # pyright: ignore[reportArgumentType]
    if x.op == "value":
        return x.kind == "float"
    if x.op == "mul":
        return any(_large(a) for a in x.args if a.op == "const") or all(map(_large, x.args))
    return any(map(_large, x.args))
