"""Layouts: an access function turned back into view calls.

q, k and v reach the product through any chain of views and copies.  Their access function ``leaf[f0(axes), f1(axes), ...]``
says where each element comes from; here it is solved for a short list of view steps from the leaf to the dims that the op
wants, so that no copy is made that the user's chain happened to make.  Solvable: every index a mixed-radix sum of axes
(``c + H*b + h``) plus an offset; anything else (flips, ``%`` of a merged axis, diagonals) is not, and a value further up the
chain is tried.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Sequence
from functools import cmp_to_key

import sympy

from .indexing import Axes, Div, Mod, _divides, _nonnegative, expr_of, same

__all__ = ["Step", "larger", "linear_terms", "view_steps"]

Step = tuple  # ("narrow", dim, start, length) ("select", dim, i) ("unflatten", dim, sizes) ("permute", dims) ("unsqueeze", dim)
# ("expand", sizes) ("reshape", sizes): sizes are sympy expressions


def linear_terms(axes: Axes, expr: sympy.Expr) -> tuple[sympy.Expr, list[tuple[sympy.Expr, sympy.Symbol]]] | None:
    """``expr = offset + sum(coefficient * axis)``, largest coefficient first; None if it is not of that form."""
    expr = sympy.expand(expr)
    if expr.has(Div, Mod):
        return None
    offset, terms = sympy.S.Zero, []
    for term in sympy.Add.make_args(expr):
        used = axes.of(term)
        if not used:
            offset += term
            continue
        if len(used) != 1:
            return None
        (axis,) = used
        coefficient = term / axis
        if axes.of(coefficient) or coefficient.as_coeff_Mul()[0] <= 0:
            return None
        terms.append((coefficient, axis))
    return offset, sorted(terms, key=cmp_to_key(larger))


def larger(a: tuple[sympy.Expr, sympy.Symbol], b: tuple[sympy.Expr, sympy.Symbol]) -> int:
    if same(a[0], b[0]):
        return 0
    if (a[0] / b[0]).is_number:
        return -1 if bool(a[0] / b[0] > 1) else 1
    return -1 if _divides(b[0], a[0]) else 1


def view_steps(
    axes: Axes, shape: Sequence, index: Sequence[sympy.Expr], groups: Sequence[Sequence[sympy.Symbol]]
) -> list[Step] | None:
    """Steps from a tensor of `shape`, read at `index`, to one dim a group; the axes of a group are merged, the first outermost.

    Axes that the index does not read are broadcast (expand). None if there are no such steps.
    """
    steps: list[Step] = []
    have: list[sympy.Symbol] = []  # the axis of each dim so far
    for size, position in zip(shape, index, strict=True):
        found = _dim_steps(axes, expr_of(size), position, len(have))
        if found is None:
            return None
        steps += found[0]
        have += found[1]
    wanted = [axis for group in groups for axis in group]
    if len(set(have)) != len(have) or not set(have) <= set(wanted):
        return None
    order = [have.index(axis) for axis in wanted if axis in have]
    if order != list(range(len(order))):
        steps.append(("permute", order))
    missing = [i for i, axis in enumerate(wanted) if axis not in have]
    steps += [("unsqueeze", i) for i in missing]
    if any(axes.sizes[wanted[i]] != 1 for i in missing):
        steps.append(("expand", [axes.sizes[a] for a in wanted]))
    if any(len(g) != 1 for g in groups):
        steps.append(("reshape", [sympy.Mul(*(axes.sizes[a] for a in g)) for g in groups]))
    return steps


def _dim_steps(axes: Axes, size: sympy.Expr, position: sympy.Expr, dim: int) -> tuple[list[Step], list[sympy.Symbol]] | None:
    linear = linear_terms(axes, position)
    if linear is None:
        return None
    offset, terms = linear
    steps: list[Step] = []
    found: list[sympy.Symbol] = []
    for coefficient, axis in terms:
        count = axes.sizes[axis]
        block, rest = (
            axes._split(offset, coefficient)
            if not (offset.is_Integer and coefficient.is_Integer)
            else (offset // coefficient, offset % coefficient)
        )
        if not same(size, count * coefficient) or block != 0:
            if not _nonnegative(size - (block + count) * coefficient):
                return None
            steps.append(("narrow", dim, block * coefficient, count * coefficient))
        if coefficient != 1:
            steps.append(("unflatten", dim, [count, coefficient]))
            dim += 1
        found.append(axis)
        size, offset = coefficient, rest
        if coefficient == 1:
            return (steps, found) if offset == 0 and axis is terms[-1][1] else None
    steps.append(("select", dim, offset))
    return steps, found
