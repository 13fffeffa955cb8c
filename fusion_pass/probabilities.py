"""From the factor of the values up to the softmaxes: what is done to probabilities on their way, as one dropout and one weight.

A weight is linear in the probability p, position by position (`fusion_kernels.weights`). It is read off the expression from the
outside in, with x standing for what is left:

    x w,  w x,  x / w,  -x         a factor
    where(c, x, 0)                 a choice: masked_fill with 0, a mask that is applied again
    where(isnan(x), 0, x)          a guard against rows without a key; nan_to_num is this, for no probability is infinite

Casts go as they do everywhere (`describe`), and a dropout may stand before a weight or after it: it multiplies each probability
by a number, and so commutes with what is linear. What w and c may read is for `scores` to say.

The sum or the difference of several such terms is one attention for each, over the same values (differential attention):

    (w p + w' p') v  =  w p v + w' p' v        w p + w' p  =  (w + w') p    with the same softmax in both terms

What is linear in a sum is so in each term; a guard, which asks of the whole whether it is NaN, is not.
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalSubscript=false
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy
import torch
from fusion_kernels.program import SCORE, Node, apply, const, postorder, rebuild

from .anchors import Anchor, reaches_product
from .describe import Describer, has_score, unrounded
from .dropout import Draw, as_dropout
from .normal import as_softmax
from .site import Reason, Refused
from .tape import Record

__all__ = ["Probabilities", "find_softmaxes", "written"]

ZERO = const(0.0)
MAX_TERMS = 8  # of a sum of softmaxes: each is a site of its own, to be described and compiled
_MADE = frozenset({"softmax", "log_softmax", "sum", "logsumexp"})  # what a softmax is made of, in some spelling


@dataclass(frozen=True)
class Probabilities:
    """The factor of the values, or one term of it, read back to the softmax.

    softmax: its node (`normal`). draw: the dropout, if there is one.
    weight: the rest, over the axes, with the leaf `SCORE` for the probability; `SCORE` itself where there is none.
    """

    softmax: Node
    draw: Draw | None = None
    weight: Node = SCORE


def find_softmaxes(d: Describer, anchor: Anchor, node: Node, key: sympy.Symbol) -> tuple[Probabilities, ...]:
    """The softmaxes over `key` that `node`, an element of the factor of the values, is a sum of.

    Raises:
        Refused: PROBABILITIES_EDITED, SOFTMAX_DIM or MUTATION.
    """
    operand = anchor.product.args[anchor.side]
    if operand.before is not None:
        raise _rewritten()
    if not has_score(node):  # there is nothing to fuse: the reason is the same whether what is there was rounded or not
        node = unrounded(node)
    reader = _Reader(d, key, operand.dtype)
    found = reader.read(node)
    if found is None:
        raise _edited(d, reader.stuck)
    positions = {term.softmax.attr[1] for term in found}
    if positions == {key} or (positions == {sympy.S.Zero} and d.axes.sizes[key] == 1):
        return found
    if reaches_product(d.shadow.readers, anchor.product.outputs[0]) is not None:
        raise Refused(Reason.PROBABILITIES_EDITED, "a product mixes them over another dim first", "softmax, then the values")
    needed = "softmax over the dim that is summed with the values"
    raise Refused(Reason.SOFTMAX_DIM, _over(anchor.record), needed)


def _over(record: Record) -> str:
    """The dim of a softmax (or of the sum of a hand-written one), as its reader counts them."""
    dims = record.args[1] if len(record.args) > 1 else record.kwargs["dim"]
    shape = record.args[0].shape
    (dim,) = dims if isinstance(dims, (list, tuple)) else (dims,)
    return f"softmax over dim {dim % len(shape)} of {len(shape)}, of a [{', '.join(map(str, shape))}] tensor"


class _Reader:
    """Reads one expression. stuck: after a failure, where it came to an end."""

    def __init__(self, d: Describer, key: sympy.Symbol, dtype: torch.dtype) -> None:
        self.d, self.key, self.dtype = d, key, dtype
        self.done: dict[Node, tuple[Probabilities, ...] | None] = {}
        self.stuck = ZERO

    def read(self, node: Node) -> tuple[Probabilities, ...] | None:
        if node not in self.done:
            self.done[node] = self._read(node)
        return self.done[node]

    def _read(self, node: Node) -> tuple[Probabilities, ...] | None:
        if node.op == "narrowed" and node.attr == self.dtype:
            return self.read(node.args[0])
        dropped = as_dropout(self.d, node)
        if dropped is not None:
            draw, x = dropped
            terms = self.read(x)
            if terms is None or any(t.draw is not None for t in terms):
                return self._stop(node)
            return tuple(replace(t, draw=draw) for t in terms)
        softmax = as_softmax(self.d, node, self.key)
        if softmax is not None:
            return (Probabilities(softmax),)
        if node.op in ("add", "sub") and all(map(_made, node.args)):
            return self._sum(node)
        tried = False
        for i in _operands(node):
            if not _made(node.args[i]):
                continue
            tried, terms = True, self.read(node.args[i])
            weights = [None] if terms is None else [_weight(node, i, t.weight, len(terms)) for t in terms]
            if terms is not None and None not in weights:
                return tuple(replace(t, weight=w) for t, w in zip(terms, weights, strict=True))
        return None if tried else self._stop(node)

    def _sum(self, node: Node) -> tuple[Probabilities, ...] | None:
        """The terms of both sides, those of one softmax (and one dropout) as one."""
        first, second = map(self.read, node.args)
        if first is None or second is None:
            return None
        if len(first) + len(second) > MAX_TERMS:
            return self._stop(node)
        if node.op == "sub":
            second = tuple(replace(t, weight=apply("neg", t.weight)) for t in second)
        found: dict[tuple[Node, Draw | None], Probabilities] = {}
        for term in (*first, *second):
            same = found.get(key := (term.softmax, term.draw))
            factors = None if same is None else [_factor(t.weight) for t in (same, term)]
            if factors is not None and None in factors:
                return self._stop(node)
            found[key] = term if factors is None else replace(term, weight=apply("mul", SCORE, apply("add", *factors)))
        return tuple(found.values())

    def _stop(self, node: Node) -> None:
        self.stuck = node


def _made(node: Node) -> bool:
    """Whether a softmax, in some spelling, is below."""
    return any(n.op in _MADE for n in postorder(node))


def _operands(node: Node) -> Iterator[int]:
    """Which arguments the probabilities may come through."""
    if node.op in ("mul", "div", "neg"):
        yield from range(2 if node.op == "mul" else 1)
    if node.op == "where":
        yield from (i for i in (1, 2) if node.args[3 - i] is ZERO or _of_itself(node, i))


def _of_itself(node: Node, i: int) -> bool:
    """Whether ``where(c, a, b)`` asks of its own operand `i` what numbers do not show: whether it is NaN, or infinite."""
    asked, operand = node.args[0], _bare(node.args[i])
    if asked.op not in ("isnan", "eq") or (asked.op == "eq" and not _is_infinite(asked.args[1])):
        return False
    of = _bare(asked.args[0])
    while operand is not of and operand.op == "where" and operand.args[0].op == "eq" and _of_itself(operand, 2):
        operand = _bare(operand.args[2])  # nan_to_num asks three times of one
    return operand is of


def _is_infinite(node: Node) -> bool:
    return node.op == "const" and node.kind == "float" and abs(node.attr) == math.inf


def _weight(node: Node, i: int, inner: Node, terms: int) -> Node | None:
    """`node` as a weight, of which operand `i` is the weight `inner`, or is a sum of `terms` of which this is one."""
    if node.op != "where" or not _of_itself(node, i):
        return apply(node.op, *(inner if j == i else a for j, a in enumerate(node.args)))
    if terms > 1:
        return None
    asked = node.args[0]
    if asked.op == "isnan":
        return apply("where", apply("isnan", inner), ZERO, inner) if i == 2 and node.args[1] is ZERO else None
    return inner if i == 2 and _bounded(inner) else None


def _factor(weight: Node) -> Node | None:
    """w, of a weight w x; None where it is a choice, which gives 0 for a NaN too."""
    if any(n.op == "where" and n.depends_on("score") for n in postorder(weight)):
        return None
    return rebuild(weight, lambda node, args: const(1.0) if node is SCORE else None)


def _bounded(weight: Node) -> bool:
    """Whether a weight of a probability is no infinity."""
    return weight is SCORE or (weight.op == "where" and all(a is ZERO or _bounded(a) for a in weight.args[1:]))


def _bare(node: Node) -> Node:
    while node.op == "narrowed":
        node = node.args[0]
    return node


def _edited(d: Describer, node: Node) -> Refused:
    if written(d, node):
        return _rewritten()
    if any(n.op in ("softmax", "sum", "log_softmax") for n in postorder(node)):
        needed = "casts, one dropout, and what is linear in each of them between softmax and values"
        return Refused(Reason.PROBABILITIES_EDITED, f"{node.op} after the softmax", needed)
    seen = "the factor of the values is not a softmax of anything that can be read back"
    return Refused(Reason.PROBABILITIES_EDITED, seen, "casts, views, dropout, masks and factors only, between softmax and values")


def _rewritten() -> Refused:
    return Refused(Reason.MUTATION, "the probabilities are written through a view of them", "out-of-place operations")


def written(d: Describer, node: Node) -> bool:
    """Whether something below was left by a write that no rule describes (through a view, or by index)."""
    values = [d.shadow.values[n.attr[0]] for n in postorder(node) if n.op == "value"]
    return any(v.before is not None or (v.record is not None and v.record.mutates) for v in values)
