"""A table that each (query, key) reads an element of, and how it lies in memory: beside each other what a row of keys reads.

A bias that a linear layer makes of pairs, or an embedding of buckets, has the heads innermost: (N, M, H).  Each head's program
then fetches every line of memory for one of its elements.  Such a table is copied into the kernel's order once; it is read by
every batch, in the forward and twice in the backward.  (One H200, an Evoformer row block of 128 rows, 8 heads, N = 384: the
forward took 0.83 ms with the heads innermost, 0.15 ms with them outermost.)
"""

# sympy is not typed
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import sympy

from .indexing import coefficient, expr_of, same
from .strides import memory_order
from .tape import Value

__all__ = ["better_order", "is_across"]


def is_across(value: Value, index: Sequence[sympy.Expr], key: sympy.Symbol) -> bool:
    """Whether elements of neighbouring keys do not lie beside each other."""
    steps = [expr_of(s) * _per(e, key) for s, e in zip(value.tensor.stride(), index, strict=True) if key in e.free_symbols]
    return bool(steps) and not same(sympy.Add(*steps), sympy.S.One)


def better_order(value: Value, index: Sequence[sympy.Expr], query: sympy.Symbol, key: sympy.Symbol) -> list[int] | None:
    """The dims of a table from the outermost to the innermost as the kernel wants them; None where it is well as it lies.

    index: where it is read, a dim each, over the axes.
    """
    by_key = [d for d, e in enumerate(index) if key in e.free_symbols]
    by_query = [d for d, e in enumerate(index) if query in e.free_symbols]
    if len(by_key) != 1 or not by_query or not is_across(value, index, key) or not same(_per(index[by_key[0]], key), sympy.S.One):
        return None
    sizes = zip(value.shape, value.tensor.stride(), strict=True)
    if any(expr_of(stride) == 0 and expr_of(size) != 1 for size, stride in sizes):
        return None  # a copy would be larger than the table
    last = [*(d for d in by_query if d not in by_key), *by_key]
    return [*(d for d in memory_order(value.tensor) if d not in last), *last]


def _per(expr: sympy.Expr, key: sympy.Symbol) -> sympy.Expr:
    """How far an index goes from one key to the next; 0 where that is not the same for all."""
    step = coefficient(expr, key)
    return sympy.S.Zero if key in (expr - step * key).expand().free_symbols else step
