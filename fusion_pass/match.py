"""Matching: from a softmax outward to the product of queries and keys above it and the product with values below it.

Nothing here knows a spelling.  A site is found by three questions to the index algebra: is one factor of this product, read
along the summed axis, a softmax over that axis?  is there a product under the softmax that reads the axis in one factor
only?  can the factors be viewed as (batch, heads, length, head dim)?
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
import torch
from fusion_kernels.program import Node, postorder

from .anchors import Anchor, reaches_product, readers
from .describe import Describer
from .indexing import Axes, expr_of, same
from .layout import Step, linear_terms, view_steps
from .normal import as_softmax
from .shadow import Record, Shadow, Value
from .site import Reason, Refused
from .views import COPIES, VIEWS, source_index

__all__ = ["Factor", "Match", "match"]


@dataclass
class Factor:
    """q, k or v: a value, the casts and view steps that take it to (B, heads, length, dim)."""

    value: Value
    casts: list[torch.dtype]
    steps: list[Step]
    shape: tuple[sympy.Expr, ...]
    dtype: torch.dtype


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
    dropout_p: float = 0.0
    zero_rows: bool = False  # torch's safe softmax: a row without a key gives zeros
    walked: set[Value] = field(default_factory=set)  # every value between the factors and the output


def match(shadow: Shadow, anchor: Anchor) -> Match:
    """Describe the site of `anchor`.

    Raises:
        Refused: it is no attention, or not one that can be described exactly.
    """
    splits: dict[str, list[sympy.Expr]] = {}
    for _ in range(4):  # each round may find that a merged batch axis has to be split further
        result = _Matcher(shadow, anchor, splits).run()
        if isinstance(result, Match):
            return result
        splits = result
    raise Refused(Reason.LAYOUT, "batch and head dims that are merged and split in ways that do not nest")


def _noise(node: Node) -> tuple[float, Node] | None:
    """``x * (bernoulli(keep) / keep)``, as dropout in place comes to: the rate and x."""
    if node.op != "mul":
        return None
    for x, noise in (node.args, node.args[::-1]):
        while noise.op.startswith("round_"):
            noise = noise.args[0]
        if noise.op == "div" and noise.args[1].op == "const" and noise.args[0].op == "bernoulli":
            keep = noise.args[0].attr[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
            if abs(keep - noise.args[1].attr) < 1e-6:  # pyright: ignore[reportOperatorIssue]
                return 1.0 - keep, x
    return None


def _written(value: Value) -> bool:
    """Whether the value was left by a write that no rule describes (through a view, or by index)."""
    return value.before is not None or (value.record is not None and value.record.mutates)


class _Matcher:
    def __init__(self, shadow: Shadow, anchor: Anchor, splits: dict[str, list[sympy.Expr]]) -> None:
        self.shadow, self.anchor, self.splits = shadow, anchor, splits
        self.axes = Axes()
        self.d = Describer(shadow, self.axes, anchor.product.grad)

    def run(self) -> Match | dict[str, list[sympy.Expr]]:
        product, side = self.anchor.product, self.anchor.side
        if product.op not in ("bmm.default", "mm.default"):
            raise Refused(Reason.NO_VALUES, f"{product.op} adds to the product with the values", "a plain product")
        output, chain = self._output(product)
        places = [self._place(f"o{j}", expr_of(s)) for j, s in enumerate(output.shape)]
        index: list[sympy.Expr] = [p[0] for p in places]
        for value in chain:
            step = source_index(self.axes, value, index)
            assert step is not None
            index = step[1]
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
        probabilities, values = product.args[side], product.args[1 - side]
        at = (*lead, row, key) if side == 0 else (*lead, key, row)
        node, dropout_p = self._probabilities(self.d.element(probabilities, at), key)
        self.key, _, zero_rows = node.attr  # pyright: ignore
        body = node.args[0]
        dot = self._score(body)
        q_chain, k_chain = self._factors(dot)
        v_at = (*lead, key, self.dim) if side == 0 else (*lead, self.dim, key)
        v_chain = self._chain(values, v_at)
        new_splits = self._new_splits()
        if new_splits:
            return new_splits
        inner = dot.attr[5]  # pyright: ignore
        for depth in (-1, 0):  # keys and values before they are repeated for the heads of a group; else as they are given
            batch, heads, kv_heads = self._grouping([k_chain[depth], v_chain[depth]])
            try:
                q = self._factor("queries", q_chain, (batch, heads, [self.query], [inner]))
                k = self._factor("keys", k_chain, (batch, kv_heads, [self.key], [inner]))
                v = self._factor("values", v_chain, (batch, kv_heads, [key], [self.dim]))
                break
            except Refused:
                if depth == 0:
                    raise
        out_steps = self._out_steps(output, places, batch, heads, dim_parts)
        walked = self.d.seen | set(chain) | {output, product.outputs[0]}
        for chain_ in (q_chain, k_chain, v_chain):
            walked |= {link[0] for link in chain_}
        return Match(
            self.anchor,
            self.d,
            output,
            out_steps,
            body,
            dot,
            self.key,
            self.query,
            batch,
            heads,
            q,
            k,
            v,
            dropout_p,
            zero_rows,
            walked,
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
                if sympy.fraction(sympy.cancel(n / (chain[-1] if chain else 1)))[1] == 1:
                    chain.append(n)
            if chain and sympy.fraction(sympy.cancel(size / chain[-1]))[1] == 1:
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
            users = [r for r in self.shadow.by_node[product.node] if value in list(r.inputs())]
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

    # ------------------------------------------------------------ the probabilities and the scores

    def _probabilities(self, node: Node, key: sympy.Symbol) -> tuple[Node, float]:
        """Down to the softmax, through casts and one dropout."""
        dropout_p = 0.0
        operand = self.anchor.product.args[self.anchor.side]
        if operand.before is not None:
            raise Refused(Reason.MUTATION, "the probabilities are written through a view of them", "out-of-place operations")
        while True:
            if node.op == "dropout" and dropout_p == 0.0:
                dropout_p, node = node.attr[0], node.args[0]  # pyright: ignore
                continue
            if node.op == "narrowed" and node.attr == operand.dtype:
                node = node.args[0]
                continue
            noise = _noise(node)
            if noise is not None and dropout_p == 0.0:
                dropout_p, node = noise
                continue
            found = as_softmax(self.d, node, key)
            if found is None:
                break
            position = found.attr[1]  # pyright: ignore
            if position != key and not (position == 0 and self.axes.sizes[key] == 1):
                if reaches_product(readers(self.shadow), self.anchor.product.outputs[0]) is not None:
                    raise Refused(
                        Reason.PROBABILITIES_EDITED, "a product mixes them over another dim first", "softmax, then the values"
                    )
                raise Refused(
                    Reason.SOFTMAX_DIM,
                    f"softmax over the dim at {position}",
                    "softmax over the dim that is summed with the values",
                )
            return found, dropout_p
        if any(_written(self.shadow.values[n.attr[0]]) for n in postorder(node) if n.op == "value"):  # pyright: ignore
            raise Refused(Reason.MUTATION, "the probabilities are written through a view of them", "out-of-place operations")
        inside = [n for n in postorder(node) if n.op in ("softmax", "sum", "log_softmax")]
        if inside:
            raise Refused(
                Reason.PROBABILITIES_EDITED,
                f"{node.op} after the softmax",
                "at most casts and one dropout between softmax and values",
            )
        raise Refused(Reason.PROBABILITIES_EDITED, "the factor of the values is not a softmax of anything that can be read back",
                      "casts, views and dropout only, between softmax and values")  # fmt: skip

    def _score(self, body: Node) -> Node:
        """The product of queries and keys: reads the keys' axis in one factor, the query axis only in the other."""
        found = []
        for node in postorder(body):
            if node.op != "dot":
                continue
            _, _, a_index, _, b_index, _ = node.attr  # pyright: ignore
            a, b = (set().union(*(self.axes.of(e) for e in i)) for i in (a_index, b_index))
            if (self.key in a and self.key in b) or (self.query in a and self.query in b):
                continue
            if self.axes.sizes[self.key] != 1 and self.key not in a | b:
                continue
            if self.axes.sizes[self.query] != 1 and self.query not in a | b:
                continue
            if self.key in a and self.query in a or self.key in b and self.query in b:
                continue
            found.append(node)
        if not found and any(_written(self.shadow.values[n.attr[0]]) for n in postorder(body) if n.op == "value"):  # pyright: ignore
            raise Refused(
                Reason.MUTATION, "the scores are written through a view of them", "in-place operations on the whole tensor"
            )
        if not found:
            raise Refused(Reason.NO_SCORES, "the softmax is not over a product of two tensors", "q @ k^T under the softmax")
        return found[0]

    # ------------------------------------------------------------ q, k, v

    def _factors(self, dot: Node) -> tuple[list, list]:
        _, a, a_index, b, b_index, _ = dot.attr  # pyright: ignore
        values = self.shadow.values
        first, second = self._chain(values[a], a_index), self._chain(values[b], b_index)
        reads = set().union(*(self.axes.of(e) for e in a_index))
        other = set().union(*(self.axes.of(e) for e in b_index))
        return (second, first) if self.key in reads or self.query in other else (first, second)

    def _chain(self, value: Value, index: Sequence[sympy.Expr]) -> list[tuple[Value, Sequence[sympy.Expr]]]:
        """Every value on the way down through views and casts, the factor itself first."""
        links: list[tuple[Value, Sequence[sympy.Expr]]] = [(value, index)]
        while True:
            step = self.d.step(*links[-1])
            if step is None:
                record = links[-1][0].record
                if (
                    record is None
                    or self.d.cut(links[-1][0])
                    or record.mutates
                    or record.op != "_to_copy.default"
                    or not record.args[0].dtype.is_floating_point
                ):
                    return links
                step = (record.args[0], links[-1][1])
            links.append(step)

    def _factor(self, what: str, links: list, groups: tuple[list[sympy.Symbol], ...]) -> Factor:
        """The value below the deepest copy from which views lead to `groups`; further up the chain where there are none."""
        copies = [i for i, (v, _) in enumerate(links) if v.record is not None and v.record.op in COPIES]
        start = min(copies[-1] + 1, len(links) - 1) if copies else 0
        below, above = range(start, len(links)), range(start - 1, -1, -1)
        held = [i for i in below if links[i][0].node is not None]  # not inside a composite call: nothing is computed twice
        for i in [*held, *below, *above]:
            value, index = links[i]
            steps = view_steps(self.axes, value.shape, index, groups)
            if steps is None:
                continue
            casts = [v.dtype for v, _ in reversed(links[:i]) if v.record is not None and v.record.op == "_to_copy.default"]
            shape = tuple(sympy.Mul(*(self.axes.sizes[a] for a in g)) for g in groups)
            return Factor(value, casts, steps, shape, links[0][0].dtype)
        raise Refused(Reason.LAYOUT, f"{what} read at {tuple(links[0][1])}", "whole dims, merged or split")
