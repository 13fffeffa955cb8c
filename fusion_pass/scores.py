"""From a match to a score program: the score under the softmax, written over (b, h, q, k), with the smallest tensors loaded.

Which parts are computed in the kernel and which are loaded is one rule: a part that reads both the query and the key axis is
computed; a part that reads one of them at most is loaded as it is, unless it is made of positions alone.  So a mask made of
``arange`` and a [B, M] padding tensor is loaded as [B, M], and a [B, 1, N, M] mask that somebody else made is loaded whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from fusion_kernels import program as p
from fusion_kernels.program import Capture, Node, Program, apply, const, postorder
from fusion_kernels.weights import selects

from .describe import INDEXED, REDUCTIONS, has_score, symbols_of
from .indexing import Div, Mod, coefficient, expr_of
from .match import Match
from .site import Reason, Refused, overwritten
from .tables import better_order, is_across
from .tape import Value

__all__ = ["Number", "Scores", "scores"]

MAX_RANK = 6
MAX_NODES = 1500
_INEQUALITIES = frozenset({"lt", "le", "gt", "ge"})


@dataclass(frozen=True)
class Number:
    """A symbolic float of the graph (an attribute of a module under dynamic shapes): read as a 0-d tensor made from it."""

    expr: sympy.Expr


@dataclass
class Scores:
    """A score program and what it reads: tensors, and integer parameters as expressions over shape symbols."""

    program: Program
    captures: list[Value | Number]
    params: list[sympy.Expr]
    orders: list[list[int] | None]  # of each capture: the order in memory that it is to be copied into (`tables`)


def scores(match: Match) -> Scores:
    """The score program of a match.

    Raises:
        Refused: (SCORES_USED) a part needs the scores themselves as a tensor; (NOT_EXPRESSIBLE) an op has no rule here;
            (TOO_LARGE) the program would be too long.
    """
    return _Writer(match).run()


def _unread(capture: Value | Number) -> Capture:
    return Capture("float", 0) if isinstance(capture, Number) else Capture(_kind(capture.dtype), len(capture.shape))


def _kind(dtype: torch.dtype) -> str:
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


class _Writer:
    def __init__(self, match: Match) -> None:
        self.m, self.axes = match, match.describer.axes
        self.captures: list[Value | Number] = []
        self.orders: list[list[int] | None] = []
        self.params: list[sympy.Expr] = []
        self.done: dict[Node, Node] = {}
        self.index: dict[sympy.Symbol, Node] = {match.query: p.index("q"), match.axis: p.index("k")}
        self.index |= self._mixed_radix(match.batch, p.index("b")) | self._mixed_radix(match.heads, p.index("h"))
        self.descended = self._descendants()

    def run(self) -> Scores:
        if sum(1 for _ in postorder(self.m.body)) > MAX_NODES:
            raise Refused(Reason.TOO_LARGE, f"a score of more than {MAX_NODES} operations", "a shorter score")
        sinks = [self.m.sink] if self.m.sink is not None else []
        for node in postorder(self.m.body, *sinks):
            if node.op in REDUCTIONS and has_score(node):
                raise Refused(
                    Reason.NOT_EXPRESSIBLE, f"{node.op} over the scores inside the softmax", "a pointwise function of q.k"
                )
            if node.op == "dropout":
                raise Refused(Reason.NOT_EXPRESSIBLE, "dropout of the scores before the softmax", "dropout after the softmax")
        root = p.apply("to_float", self.write(self.m.body))
        sinks = [self._sink(z) for z in sinks]
        weight = None if self.m.weight is None else self._weight(self.m.weight)
        weights = [] if weight is None else [weight]
        read = {n.attr: Capture(n.kind, len(n.args)) for n in postorder(root, *sinks, *weights) if n.op == "load"}
        # what folding left unread stays a capture, for its gradient is zero in eager, not absent
        captures = tuple(read.get(i) or _unread(c) for i, c in enumerate(self.captures))
        program = Program(root, captures, len(self.params), self.m.zero_rows, *sinks, inf_rows=self.m.inf_rows, weight=weight)
        return Scores(program, self.captures, self.params, self.orders)

    def _sink(self, sink: Node) -> Node:
        """The score of a column that is in the softmax and has no value.

        Raises:
            Refused: (NOT_EXPRESSIBLE) it is the score of a key, or another one for each key.
        """
        product = self.m.dot.attr[0]  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]
        if any(n.op == "dot" and n.attr[0] == product for n in postorder(sink)):  # pyright: ignore
            seen = "the probability of a key is left out of the product with the values"
            raise Refused(Reason.NOT_EXPRESSIBLE, seen, "every key, or a column that is no key (an attention sink)")
        root = p.apply("to_float", self.write(sink))
        if root.depends_on("score", "k"):
            raise Refused(Reason.NOT_EXPRESSIBLE, "a sink that depends on the keys", "a column that is no key, the same for all")
        return root

    def _weight(self, weight: Node) -> Node | None:
        """What is done to the probabilities, of `SCORE`; None where nothing is left of it.

        Raises:
            Refused: (PROBABILITIES_EDITED) it reads the scores or what is made from them, or is random.
        """
        needed = "factors and choices that are known without the scores"
        product = self.m.dot.attr[0]  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]
        for n in postorder(weight):
            if n.op == "dot" and n.attr[0] == product:  # pyright: ignore
                raise Refused(
                    Reason.PROBABILITIES_EDITED, f"{weight.op} after the softmax, by what is made from the scores", needed
                )
            if n.op in ("dropout", "bernoulli"):
                seen = "a random mask that is no dropout, or a second one"
                raise Refused(Reason.PROBABILITIES_EDITED, seen, "one dropout of the probabilities")
        try:
            root = self.write(weight)
        except Refused as refusal:
            if refusal.reason is not Reason.NOT_EXPRESSIBLE:
                raise
            seen = f"{weight.op} after the softmax, by what cannot be described ({refusal.seen})"
            raise Refused(Reason.PROBABILITIES_EDITED, seen, needed) from None
        if self.m.inf_rows and selects(root):
            seen = "some probabilities of a quotient without a shift, which may be NaN for one key alone, are replaced by 0"
            raise Refused(Reason.PROBABILITIES_EDITED, seen, "torch.softmax, or scores less their maximum")
        return None if root is p.SCORE else root

    def _mixed_radix(self, axes: list[sympy.Symbol], whole: Node) -> dict[sympy.Symbol, Node]:
        """Each axis of a merged index: ``(whole // below) % size``."""
        found, below = {}, sympy.S.One
        for axis in reversed(axes):
            part = apply("floordiv", whole, self._uniform(below))
            found[axis] = part if axis is axes[0] else apply("mod", part, self._uniform(self.axes.sizes[axis]))
            below *= self.axes.sizes[axis]
        return found

    def _uniform(self, expr: sympy.Expr) -> Node:
        return const(int(expr)) if expr.is_Integer else self._param(expr)

    def _param(self, expr: sympy.Expr) -> Node:
        if expr not in self.params:
            self.params.append(expr)
        return p.param(self.params.index(expr))

    def _descendants(self) -> set[Value]:
        """Values made from the product of queries and keys: none of them may be loaded.

        Nor those of calls that merely take the scores, as ``bias.expand_as(scores)`` does: they would keep the scores alive.
        """
        records = self.m.describer.shadow.between(self.m.dot.attr[0], self.m.end)  # pyright: ignore
        first, last = records[0], records[-1]
        nodes, node = {first.node}, first.node
        while node is not last.node:
            node = node.next
            if any(i in nodes for i in node.all_input_nodes):
                nodes.add(node)
        found = set(first.outputs)
        for record in records[1:]:
            if record.node in nodes or any(v in found for v in record.inputs):
                found.update(record.outputs)
        return found

    # ------------------------------------------------------------ nodes

    def write(self, node: Node) -> Node:
        new = self.done.get(node)
        if new is None:
            new = self.done[node] = self._write(node)
        return new

    def _write(self, node: Node) -> Node:
        if node is self.m.dot or node is p.SCORE:
            return p.SCORE
        if node.op == "narrowed":  # a score that is kept in fp32 only gets closer to float64
            return self.write(node.args[0])
        if node.op == "const":
            return node
        if node.op == "sym":
            return self.integer(node.attr)  # pyright: ignore
        if node.op == "number":
            return self._captured(Number(node.attr), [])  # pyright: ignore
        if node.op in _INEQUALITIES and all(a.op == "sym" or (a.op == "const" and a.kind == "int") for a in node.args):
            return self.inequality(node)
        if self._reads_score(node):
            return apply(node.op, *map(self.write, node.args))
        if not any(n.op == "number" or n.op in INDEXED or n.op in REDUCTIONS for n in postorder(node)):
            return apply(node.op, *map(self.write, node.args))  # made of positions alone
        reads = symbols_of(node)
        pointwise = node.args and node.op not in REDUCTIONS and node.op != "dropout"
        # a table, or a mask of keys, is better made from its parts, if they are there: a mask's parts say what is hidden
        apart = pointwise and self.m.axis in reads and (self.m.query in reads or _is_mask(node))
        if apart and not (self._spoiled(node) and self._holders(node)):
            return apply(node.op, *map(self.write, node.args))
        loaded = self._load(node)
        if loaded is not None:
            return loaded
        if not pointwise:
            if (held := self._held(node)) and not self._holders(node):
                raise overwritten(held[0][0].shape)
            raise Refused(Reason.NOT_EXPRESSIBLE, f"a part of the score ({node.op}) that is in no tensor", "pointwise parts")
        return apply(node.op, *map(self.write, node.args))

    def _reads_score(self, node: Node) -> bool:
        """Whether the score is read, or in a weight the probability."""
        return any(n is self.m.dot or n is p.SCORE for n in postorder(node))

    def _held(self, node: Node) -> list[tuple[Value, tuple[sympy.Expr, ...]]]:
        """The tensors that hold the part where they are made, and the index."""
        d = self.m.describer
        held = list(d.held.get(node, ()))
        if node.op == "value":
            held.append((d.shadow.values[node.attr[0]], node.attr[1]))  # pyright: ignore
        return [(v, i) for v, i in held if len(v.shape) <= MAX_RANK]

    def _holders(self, node: Node) -> list[tuple[Value, tuple[sympy.Expr, ...]]]:
        """Those of them that still hold it where the op reads them."""
        shadow, end = self.m.describer.shadow, self.m.end
        return [(v, i) for v, i in self._held(node) if not shadow.written_between(v, v.seq, end)]

    def _spoiled(self, node: Node) -> bool:
        """Whether something below is in no tensor: it was overwritten by what became of it, or never stood alone (addmm)."""
        parts = (n for n in postorder(node) if n.op == "dot" or (n.op == "value" and self._held(n)))
        return any(not self._holders(n) for n in parts)

    def _load(self, node: Node) -> Node | None:
        """Read the part from the smallest tensor that holds it."""
        held = self._holders(node)
        if node.args:  # a tensor that was made larger than what it holds is made again, from its parts
            reads = symbols_of(node)
            held = [(v, i) for v, i in held if {a for e in i for a in self.axes.of(e)} <= reads]
        if not held:
            return None
        if all(v in self.descended for v, _ in held):
            if node.args and node.op not in REDUCTIONS and node.op != "dropout":
                return None  # made with the scores' shape: written out from its parts instead
            seen = "the score reads a tensor that is computed from the scores (a top-k threshold, a row norm)"
            raise Refused(Reason.NOT_EXPRESSIBLE, seen, "a pointwise function of q.k")
        held = [(v, i) for v, i in held if v not in self.descended]
        value, index = min(held, key=lambda h: _weight(h[0], is_across(*h, self.m.axis)))
        order = better_order(value, index, self.m.query, self.m.axis)
        loaded = self._captured(value, [self.integer(e) for e in index], order)
        return apply("to_bool", loaded) if node.kind == "bool" and loaded.kind != "bool" else loaded

    def _captured(self, what: Value | Number, index: list[Node], order: list[int] | None = None) -> Node:
        if what not in self.captures:
            self.captures.append(what)
            self.orders.append(order)
        dtype = torch.float32 if isinstance(what, Number) else what.dtype
        kind = _kind(dtype)
        return p.load(self.captures.index(what), kind, index)

    def inequality(self, node: Node) -> Node:
        """A comparison of positions in normal form: ``a k + b q + ... <= c`` with a > 0 (b > 0 without a k), or its negation.

        So one condition is one node, whichever way round it was written: ``k > q`` and ``k >= q + 1`` are ``not (k <= q)``.
        """
        a, b = (expr_of(x.attr) for x in node.args)
        if node.op in ("ge", "gt"):
            a, b = b, a
        below = sympy.expand(a - b)  # a <= b is a - b <= 0
        above = 1 - below  # what is no more than 0 where it is not
        strict = int(node.op in ("lt", "gt"))
        below, above = below + strict, above - strict
        leading = [c for x in (self.m.axis, self.m.query) if (c := coefficient(below, x)) != 0]
        turned = bool(leading) and leading[0].is_negative
        terms = sympy.Add.make_args(sympy.expand(above if turned else below))
        left = sympy.Add(*(t for t in terms if self.axes.of(t) and t.as_coeff_Mul()[0] > 0))
        found = apply("le", self.integer(left), self.integer(left - sympy.Add(*terms)))
        return apply("not", found) if turned else found

    def integer(self, expr: Any) -> Node:
        """A sympy index expression as integer nodes; parts without axes are parameters, computed on the host."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return const(int(expr))
        if expr in self.index:
            return self.index[expr]
        if not self.axes.of(expr):
            return self._param(expr)
        if expr.is_Symbol:
            raise Refused(
                Reason.NOT_EXPRESSIBLE, f"the score reads the axis {expr}", "axes of the batch, heads, queries and keys"
            )
        if isinstance(expr, (Div, Mod)):
            return apply("floordiv" if isinstance(expr, Div) else "mod", *map(self.integer, expr.args))
        if expr.is_Add:
            with_axes = [t for t in expr.args if self.axes.of(t)]
            rest = sympy.Add(*(t for t in expr.args if not self.axes.of(t)))
            terms = [self.integer(t) for t in sorted(with_axes, key=sympy.default_sort_key)]
            total = terms[0]
            for term in terms[1:]:
                total = apply("add", total, term)
            return apply("add", total, self._uniform(rest)) if rest != 0 else total
        if expr.is_Mul:
            factors = [self.integer(t) for t in expr.args if self.axes.of(t)]
            rest = sympy.Mul(*(t for t in expr.args if not self.axes.of(t)))
            product = factors[0]
            for factor in factors[1:]:
                product = apply("mul", product, factor)
            return apply("mul", product, self._uniform(rest)) if rest != 1 else product
        if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
            return apply("mul", self.integer(expr.base), self.integer(expr.base ** (expr.exp - 1)))
        raise Refused(Reason.NOT_EXPRESSIBLE, f"the index {expr}", "sums, products, // and % of positions and sizes")


def _is_mask(node: Node) -> bool:
    """Whether a part chooses between numbers."""
    return node.op == "where" and all(a.op == "const" for a in node.args[1:])


def _weight(value: Value, across: bool) -> tuple[int, bool, bool, int]:
    """Smaller first; among equals one that a Dynamo node holds, then one that lies as it is read, then the one made first."""
    numel = 1
    for s in value.shape:
        e = expr_of(s)
        numel *= int(e) if e.is_Integer else 64  # a symbolic dim counts as long
    return numel, value.node is None, across, value.id
