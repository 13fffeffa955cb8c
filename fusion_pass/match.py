"""Matching: from a softmax outward to the product of queries and keys above it and the product with values below it.

Nothing here knows a spelling.  A site is found by three questions to the index algebra: is one factor of this product, read
along the summed axis, a softmax over that axis?  is there a product under the softmax that reads the axis in one factor
only?  can the factors be viewed as (batch, heads, length, head dim)?
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import sympy
import torch
from fusion_kernels.program import SCORE, Node

from .anchors import Anchor
from .describe import Describer
from .dropout import Bits, Draw, own_bits
from .factors import Factor, chain_of, factor
from .gates import find_gate, sink_of
from .indexing import Axes, expr_of, same, whole
from .layout import Step, linear_terms
from .probabilities import find_softmaxes
from .products import products_under
from .site import Reason, Refused
from .tape import Record, Shadow, Value
from .views import VIEWS, source_index

__all__ = ["Match", "match"]


@dataclass
class Match:
    """A site as the index algebra sees it; `program.py` terms are made from it by `scores`."""

    anchor: Anchor
    describer: Describer
    output: Value  # the value to replace
    out_steps: list[Step]  # from the op's (B, H, N, Dv) to the shape of `output`
    body: Node  # the score under the softmax, over the axes
    dot: Node
    axis: sympy.Symbol  # k
    query: sympy.Symbol
    batch: list[sympy.Symbol]
    heads: list[sympy.Symbol]
    q: Factor
    k: Factor
    v: Factor
    draw: Draw | None = None
    bits: Bits | None = None
    zero_rows: bool = False  # torch's safe softmax: a row without a key gives zeros; with a sink, it is the sink's
    inf_rows: bool = False  # a quotient without a shift: a row with +inf is NaN at that key alone
    sink: Node | None = None  # a score without a key, over the axes of the rows (`sinks`)
    weight: Node | None = None  # what is done to the probabilities, over the axes (`probabilities`)
    end: int = 0  # the number of the call in whose place the op stands: the product with the values, or a gate on it
    walked: set[Value] = field(default_factory=set)  # what lies between the factors and the output
    products: set[int] = field(default_factory=set)  # numbers of the calls whose product may be `dot`
    terms: int = 1  # how many softmaxes the factor of the values is a sum of
    others: list[Match] = field(default_factory=list)  # those of the other terms: the output is the sum of all

    @property
    def product(self) -> int:
        """The number of the call that makes `dot`."""
        return self.dot.attr[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript, reportReturnType]

    @property
    def dropout_p(self) -> float:
        return self.draw.p if self.draw is not None else 0.0


def match(shadow: Shadow, anchor: Anchor, prefer: Collection[int] = ()) -> Match:
    """Describe the site of `anchor`.

    Args:
        prefer: which of several products under the softmax are to be computed, rather than loaded (see `products`).

    Raises:
        Refused: it is no attention, or not one that can be described exactly.
    """
    with suppress(Refused):
        return _split(shadow, anchor, prefer, gated=True)
    try:
        first = _split(shadow, anchor, prefer)
        first.others = [_split(shadow, anchor, prefer, term=i) for i in range(1, first.terms)]
        return first
    except Refused as refusal:
        if refusal.reason not in (Reason.NO_SCORES, Reason.PROBABILITIES_EDITED):
            raise
        for record in _products_of_one(shadow, anchor):
            with suppress(Refused):
                found = _split(shadow, anchor, prefer, record)
                if found.terms == 1:
                    return found
        raise


def _split(
    shadow: Shadow, anchor: Anchor, prefer: Collection[int], one: Record | None = None, gated: bool = False, term: int = 0
) -> Match:
    splits: dict[str, list[sympy.Expr]] = {}
    for _ in range(4):  # each round may find that a merged batch axis has to be split further
        result = _Matcher(shadow, anchor, splits, one, gated).run(prefer, term)
        if isinstance(result, Match):
            return result
        splits = result
    raise Refused(Reason.LAYOUT, "batch and head dims that are merged and split in ways that do not nest")


def _no_gate() -> Refused:
    return Refused(Reason.NO_VALUES, "no gate that is a sink stands on the output", "the sigmoid of a log-sum-exp less a sink")


def _products_of_one(shadow: Shadow, anchor: Anchor) -> list[Record]:
    """Multiplications under the softmax that may be products of queries and keys of head dim 1, the likeliest first.

    A sum over one element is no product of matrices: einsum multiplies, and so may whoever writes it by hand.
    """
    last = anchor.record.seq
    found = [r for r in shadow.between(0, last) if r.op == "mul.Tensor" and _outer(r)]
    found = [r for r in found if anchor.record.outputs[0] in shadow.made_from(r.seq, last)]
    return sorted(found, key=lambda r: (r.node.target is not torch.einsum, -r.seq))


def _outer(record: Record) -> bool:
    """Whether each factor of a multiplication is broadcast along a dim of the other."""
    a, b = record.args
    if not isinstance(a, Value) or not isinstance(b, Value) or not a.dtype.is_floating_point or a.dtype != b.dtype:
        return False
    one = [expr_of(s) == 1 for s in (*a.shape, *b.shape)]
    rank = min(len(a.shape), len(b.shape))
    pairs = [*zip(one[len(a.shape) - rank : len(a.shape)], one[len(one) - rank :], strict=True)]
    return (True, False) in pairs and (False, True) in pairs


class _Matcher:
    def __init__(
        self, shadow: Shadow, anchor: Anchor, splits: dict[str, list[sympy.Expr]], one: Record | None, gated: bool
    ) -> None:
        self.shadow, self.anchor, self.splits, self.gated = shadow, anchor, splits, gated
        self.axes = Axes()
        self.d = Describer(shadow, self.axes, anchor.product.grad, one)

    def run(self, prefer: Collection[int], term: int) -> Match | dict[str, list[sympy.Expr]]:
        product, side = self.anchor.product, self.anchor.side
        if product.op not in ("bmm.default", "mm.default"):
            raise Refused(Reason.NO_VALUES, f"{product.op} adds to the product with the values", "a plain product")
        output, chain = self._output(product)
        gate = find_gate(self.shadow, output) if self.gated else None
        if gate is not None:
            output, chain = gate.record.outputs[0], [*gate.views, *chain]
        elif self.gated:
            raise _no_gate()
        probabilities, values = product.args[side], product.args[1 - side]
        places = [self._place(f"o{j}", expr_of(s)) for j, s in enumerate(output.shape)]
        index: list[sympy.Expr] = [p[0] for p in places]
        for value in chain:
            step = source_index(self.axes, value, index)
            assert step is not None
            index = step[1]
        self._whole(product.outputs[0], index)
        *batch_index, row, column = index
        if side == 1:
            row, column = column, row
        columns = product.outputs[0].shape[-1 - side]
        self.batch = self._merged(batch_index[0] if batch_index else sympy.S.Zero)
        self.query, more = self._query(self._merged(row))
        self.batch += more
        dim_parts = self._merged(column)
        self.dim = self.axes.new("e", expr_of(columns))
        key = self.axes.new("r", expr_of(product.args[side].shape[-1 - side]))
        lead = tuple(batch_index)
        at = (*lead, row, key) if side == 0 else (*lead, key, row)
        terms = find_softmaxes(self.d, self.anchor, self.d.element(probabilities, at), key)
        if gate is not None and len(terms) > 1:
            raise _no_gate()
        weighted = terms[term]
        node, draw = weighted.softmax, weighted.draw
        self.key, _, zero_rows, inf_rows = node.attr  # pyright: ignore
        weight = None if weighted.weight is SCORE else self.d.substitute(weighted.weight, {key: self.key})
        body = node.args[0]
        products = products_under(self.d, body, self.query, self.key, prefer)
        sink = node.args[1] if len(node.args) > 1 else None
        if gate is not None:
            sink = sink_of(self.d, gate, [p[0] for p in places], body, self.key) if sink is None and not zero_rows else None
            if sink is None:
                raise _no_gate()
        v_at = (*lead, key, self.dim) if side == 0 else (*lead, self.dim, key)
        v_chain = chain_of(self.d, values, v_at)
        new_splits = self._new_splits()
        if new_splits:
            return new_splits
        refusals: list[Refused] = []
        # keys and values before they are repeated for the heads of a group; else as they are given
        for found, depth in [(p, depth) for p in products for depth in (-1, 0)]:
            inner = found.dot.attr[5]  # pyright: ignore
            batch, heads, kv_heads = self._grouping([found.k_chain[depth], v_chain[depth]])
            try:
                q = factor(self.axes, "queries", found.q_chain, (batch, heads, [self.query], [inner]))
                k = factor(self.axes, "keys", found.k_chain, (batch, kv_heads, [self.key], [inner]))
                v = factor(self.axes, "values", v_chain, (batch, kv_heads, [key], [self.dim]))
                break
            except Refused as refusal:
                refusals.append(refusal)
        else:
            raise refusals[-1]
        bits = own_bits(self.d, draw, [*batch, *heads], self.query, key) if draw is not None else None
        out_steps = self._out_steps(output, places, batch, heads, dim_parts)
        walked = self.d.seen | set(chain) | {output, product.outputs[0]}
        return Match(
            self.anchor,
            self.d,
            output,
            out_steps,
            body,
            found.dot,
            self.key,
            self.query,
            batch,
            heads,
            q,
            k,
            v,
            draw,
            bits,
            zero_rows,
            inf_rows,
            sink,
            weight,
            product.seq if gate is None else gate.record.seq,
            walked,
            {p.seq for p in products},
            len(terms),
        )

    # ------------------------------------------------------------ axes

    def _place(self, name: str, size: sympy.Expr) -> tuple[sympy.Expr, list[sympy.Symbol]]:
        """The index variable of an output dim: one axis, or several where an earlier round found that it is a merged one."""
        if name not in self.splits:
            axis = self.axes.new(name, size)
            return axis, [axis]
        parts, total = [], sympy.S.Zero
        radices = [*self.splits[name], size]
        below = sympy.S.One
        for j, radix in enumerate(radices):
            axis = self.axes.new(f"{name}_{j}", sympy.cancel(radix / below))
            parts.insert(0, axis)
            total += axis * below
            below = radix
        return sympy.expand(total), parts

    def _new_splits(self) -> dict[str, list[sympy.Expr]] | None:
        """Batch axes that some index divides, with the divisors in order; None if there are no new ones."""
        found: dict[str, list[sympy.Expr]] = {}
        for axis, n in self.axes.radices:
            size = self.axes.sizes[axis]
            if axis in self.batch and axis.name in {f"o{j}" for j in range(9)} and not same(n, size):
                if all(not same(n, other) for other in found.get(axis.name, [])):
                    found.setdefault(axis.name, []).append(n)
        new: dict[str, list[sympy.Expr]] = {}
        for name, radices in found.items():
            size = self.axes.sizes[next(a for a in self.batch if a.name == name)]
            chain: list[sympy.Expr] = []
            for n in sorted(
                radices, key=lambda e: (len(e.free_symbols), sympy.default_sort_key(e)) if not e.is_Integer else (0, int(e))
            ):  # type: ignore[misc]
                if whole(sympy.cancel(n / (chain[-1] if chain else 1))):
                    chain.append(n)
            if chain and whole(sympy.cancel(size / chain[-1])):
                new[name] = chain
        return {**self.splits, **new} if new else None

    def _query(self, parts: list[sympy.Symbol]) -> tuple[sympy.Symbol, list[sympy.Symbol]]:
        """The query axis among the axes that the rows merge; the others (a kv head's group, folded into rows) are heads.

        Any choice is right; the longest axis, and of equals the innermost, leaves the kernel the most to tile.
        """
        if not parts:
            return self.axes.new("q", sympy.S.One), []
        sizes = [self.axes.sizes[a] for a in parts]
        best = max(range(len(parts)), key=lambda i: (not sizes[i].is_Integer, int(sizes[i]) if sizes[i].is_Integer else 0, i))
        return parts[best], [a for i, a in enumerate(parts) if i != best]

    def _whole(self, product: Value, index: Sequence[sympy.Expr]) -> None:
        """Refuse where the output is a part of the product alone: the op makes all of it."""
        for size, expr in zip(product.shape, index, strict=True):
            kept = sympy.Mul(*(self.axes.sizes[a] for a in self.axes.of(expr)))
            if not same(kept, expr_of(size)):
                seen = f"{kept} of the {expr_of(size)} elements of a dim of the product with the values are kept"
                raise Refused(Reason.LAYOUT, seen, "the whole product")

    def _merged(self, expr: sympy.Expr) -> list[sympy.Symbol]:
        """The axes that a dim of the product merges, outermost first."""
        linear = linear_terms(self.axes, expr)
        if linear is None or linear[0] != 0:
            raise Refused(
                Reason.LAYOUT, f"the product with the values is read at {expr}", "a view that merges or splits whole dims"
            )
        return [axis for _, axis in linear[1]]

    def _grouping(self, links: list[tuple[Value, Sequence[sympy.Expr]]]) -> tuple[list[sympy.Symbol], ...]:
        """Batch, head and kv head axes. Axes that neither keys nor values read are the query heads of one kv head."""
        read = {a for _, index in links for e in index for a in self.axes.of(e)}
        deepest = [a for a in self.batch if a in read]
        shared = [a for a in self.batch if a not in read]
        if not shared:
            return deepest[:-1] or deepest, deepest[-1:] if len(deepest) > 1 else [], deepest[-1:] if len(deepest) > 1 else []
        if len(deepest) > 1:
            return deepest[:-1], [deepest[-1], *shared], [deepest[-1]]
        return deepest, shared, []

    # ------------------------------------------------------------ the output

    def _output(self, product: Record) -> tuple[Value, list[Value]]:
        """The value that a Dynamo node holds, and the views from it down to the product, outermost first."""
        value, chain = product.outputs[0], []
        while value.node is None:
            users = [r for r in self.shadow.by_node[product.node] if value in list(r.inputs)]
            if len(users) != 1 or users[0].op not in VIEWS or len(users[0].outputs) != 1:
                break
            value = users[0].outputs[0]
            chain.insert(0, value)
        if value.node is None:
            return product.outputs[0], []
        return value, chain

    def _out_steps(self, output: Value, places: list, batch: list, heads: list, dim: list) -> list[Step]:
        """From the op's (B, H, N, Dv) to the output: split into axes, permute, merge."""
        have = [*batch, *heads, self.query, *dim]
        wanted = [axis for _, parts in places for axis in parts]
        if self.query not in wanted:  # one query: no dim of the output reads it
            wanted, places = [self.query, *wanted], [(sympy.S.Zero, []), *places]
        sizes = [self.axes.sizes[a] for a in have]
        steps: list[Step] = []
        if len(batch) != 1 or len(heads) != 1 or len(dim) != 1:
            steps.append(("reshape", sizes))
        ones = [a for a in wanted if a not in have]  # dims of size one are read by no index
        if any(self.axes.sizes[a] != 1 for a in ones) or len(set(have)) != len(have):
            raise Refused(Reason.LAYOUT, "the product with the values is broadcast afterwards")
        order = [have.index(a) for a in wanted if a in have]
        if order != list(range(len(order))):
            steps.append(("permute", order))
        if ones or any(len(parts) != 1 for _, parts in places):
            steps.append(("reshape", [expr_of(s) for s in output.shape]))
        return steps
