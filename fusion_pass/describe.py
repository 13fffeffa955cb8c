"""From ATen calls to one expression: ``Describer.element(value, index)`` is element `index` of a value, as a program node.

This is the normal form.  Views become index arithmetic, pointwise calls become nodes, masks made from ``arange`` become
comparisons of axes, and a product of matrices becomes one ``dot`` leaf, whatever the spelling.  What has no rule is a leaf:
a tensor that is loaded.  Leaves beyond those of a score program, all internal to the analysis:

    sym      an integer expression over axes (attr: sympy)
    value    an element of a tensor (attr: value id, index)
    join     the same, of a tensor put together from parts of which one is made of scores (`joins`)
    dot      sum over an axis of a product (attr: record seq, a id, a index, b id, b index, axis)
    softmax, log_softmax, sum, amax, logsumexp (one arg, attr: bound axis, ...)
    dropout (one arg, attr: p, record seq, index), bernoulli (attr: probability of 1, record seq, index)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from fusion_kernels.program import Node, apply, postorder, rebuild

from . import joins, kinds, pointwise, reductions
from .float16_masks import rounded_sum
from .indexing import Axes, expr_of
from .kinds import has_score, sym
from .site import Reason, Refused
from .tape import Record, Shadow, Value
from .views import source_index

__all__ = ["Describer", "has_score", "sym", "symbols_of", "unrounded"]

Index = Sequence[sympy.Expr]
MAX_ELEMENTS = 4000  # (value, index) pairs of one site: a 20-op score takes about 100

PRODUCTS = {"bmm.default": 0, "mm.default": 0, "baddbmm.default": 1, "addmm.default": 1}  # op -> position of the first factor


def symbols_of(node: Node) -> set[sympy.Symbol]:
    """Every axis and shape symbol that the expression reads, bound axes of reductions excluded."""
    found: set[sympy.Symbol] = set()
    for n in postorder(node):
        if n.op == "sym":
            found |= n.attr.free_symbols  # pyright: ignore
        elif n.op in INDEXED:
            for part in n.attr:  # pyright: ignore
                for e in part if isinstance(part, tuple) else ():
                    found |= e.free_symbols
        elif n.op in REDUCTIONS:
            found |= getattr(n.attr[1], "free_symbols", set())  # pyright: ignore
    bound = {n.attr[0] for n in postorder(node) if n.op in REDUCTIONS}  # pyright: ignore
    return found - bound


def unrounded(node: Node) -> Node:
    """`node` without what rounds parts of it to 16 bits."""

    def step(n: Node, args: tuple[Node, ...]) -> Node | None:
        if n.op in ("round_float16", "round_bfloat16"):
            return args[0]
        return Node.make(n.op, *args, attr=n.attr, kind=n.kind) if n.args else n

    return rebuild(node, step)


INDEXED = frozenset({"value", "join", "dot", "dropout", "bernoulli"})
REDUCTIONS = frozenset({"softmax", "log_softmax", "sum", "amax", "logsumexp"})


DETACHING = frozenset({"detach.default"})
RULES = {**pointwise.RULES, **reductions.RULES, **joins.RULES}


class Describer:
    """Element expressions over one tape. One instance a site, so that its axes stay its own."""

    def __init__(self, shadow: Shadow, axes: Axes, grad: bool = True, one: Record | None = None) -> None:
        self.shadow, self.axes = shadow, axes
        self.grad = grad  # the grad mode of the site
        self.one = one  # a multiplication to be read as a product of matrices over an axis of one
        self.memo: dict[tuple[int, tuple[sympy.Expr, ...]], Node] = {}
        self.held: dict[Node, list[tuple[Value, tuple[sympy.Expr, ...]]]] = {}  # node -> tensors that hold its value
        self.steps: dict[tuple[int, tuple[sympy.Expr, ...]], tuple[Value, list[sympy.Expr]] | None] = {}
        self.bound: dict[tuple[int, int], sympy.Symbol] = {}  # record seq, which -> the axis that the call binds
        self.kept: dict[sympy.Symbol, sympy.Symbol] = {}  # axis of a softmax -> that of its columns which are keys
        self.seen: set[Value] = set()

    def element(self, value: Value, index: Index) -> Node:
        """Element `index` of `value`.

        Raises:
            Refused: (TOO_LARGE) the expression has more parts than `MAX_ELEMENTS`.
        """
        key = (value.id, tuple(index))
        node = self.memo.get(key)
        if node is not None:
            return node
        if len(self.memo) >= MAX_ELEMENTS:
            raise Refused(Reason.TOO_LARGE, f"more than {MAX_ELEMENTS} parts in one score", "a score of fewer operations")
        self.memo[key] = self.leaf(value, index)  # a cycle cannot happen; a re-entry would read the tensor
        try:
            node = self._element(value, tuple(index))
        except RecursionError:
            raise Refused(Reason.TOO_LARGE, "a score nested too deeply", "a score of fewer operations") from None
        self.memo[key] = node
        self.seen.add(value)
        self.held.setdefault(node, []).append((value, tuple(index)))
        return node

    def cut(self, value: Value) -> bool:
        """Whether gradients stop at `value`: detached, or made in another grad mode. Nothing below it may be read instead."""
        record = value.record
        if record is None or not self.grad or not value.dtype.is_floating_point:
            return False
        return (record.op in DETACHING or not record.grad) and any(v.differentiable for v in record.inputs)

    def step(self, value: Value, index: Index) -> tuple[Value, list[sympy.Expr]] | None:
        """One view down, where gradients flow through it."""
        key = (value.id, tuple(index))
        if key not in self.steps:
            self.steps[key] = None if self.cut(value) else source_index(self.axes, value, index)
        return self.steps[key]

    def beyond(self, node: Node) -> Node:
        """What is read where gradients stop, as if they did not: for asking what values are equal."""
        while node.op == "value" and self.cut(value := self.shadow.values[node.attr[0]]):  # pyright: ignore
            index = node.attr[1]  # pyright: ignore
            below = source_index(self.axes, value, index)
            new = self.element(*below) if below is not None else self._computed(value, index)
            if new is node:
                break
            node = new
        return node

    def leaf(self, value: Value, index: Index) -> Node:
        kind = "bool" if value.dtype == torch.bool else "float" if value.dtype.is_floating_point else "int"
        return Node.make("value", attr=(value.id, tuple(index)), kind=kind)

    def _element(self, value: Value, index: tuple[sympy.Expr, ...]) -> Node:
        constant = getattr(value.tensor, "constant", None)
        if constant is not None and constant.numel() == 1:
            return kinds.scalar(constant.item())  # torch.tensor(0.125) in the graph
        step = self.step(value, index)
        if step is not None:
            return self.element(*step)
        return self.leaf(value, index) if self.cut(value) else self._computed(value, index)

    def _computed(self, value: Value, index: tuple[sympy.Expr, ...]) -> Node:
        record = value.record
        if record is None or value.dtype.is_complex:
            return self.leaf(value, index)
        if record.op in PRODUCTS:
            return self.product(record, index)
        if record is self.one:
            return self.product_of_one(record, index)
        rule = RULES.get(record.op) or RULES.get(record.op.partition(".")[0])
        if rule is None or value.output:
            return self.leaf(value, index)
        node = rule(self, record, index, value)
        if node is None:
            return self.leaf(value, index)
        return kinds.cast(node, value.dtype, rounds=not has_score(node))

    # ------------------------------------------------------------ parts that rules use

    def arg(self, x: Any, record: Record, index: Index) -> Node:
        """An argument of a pointwise call at `index` of the result: tensors broadcast from the right."""
        if not isinstance(x, Value):
            return kinds.scalar(x)
        return self.element(x, self.broadcast(x, index))

    def broadcast(self, x: Value, index: Index) -> tuple[sympy.Expr, ...]:
        """Where `x` is read for element `index` of a result that it is broadcast to."""
        rank = len(x.shape)
        tail = index[len(index) - rank :] if rank else ()
        return tuple(sympy.S.Zero if expr_of(s) == 1 else i for s, i in zip(x.shape, tail, strict=True))

    def bound_axis(self, record: Record, size: Any, name: str, which: int = 0) -> sympy.Symbol:
        if (record.seq, which) not in self.bound:
            self.bound[record.seq, which] = self.axes.new(f"{name}{record.seq}", expr_of(size))
        return self.bound[record.seq, which]

    def kept_axis(self, axis: sympy.Symbol, key: sympy.Symbol) -> sympy.Symbol:
        """A bound axis as long as `key`, for what is left of `axis`."""
        if axis not in self.kept:
            self.kept[axis] = self.axes.new(f"{axis.name}_kept", self.axes.sizes[key])
        return self.kept[axis]

    def product(self, record: Record, index: Index) -> Node:
        """bmm, mm and their forms with an addend: ``alpha * dot + beta * addend``."""
        first = PRODUCTS[record.op]
        a, b = record.args[first], record.args[first + 1]
        *batch, row, column = index
        inner = self.bound_axis(record, a.shape[-1], "d")
        node = Node.make("dot", attr=(record.seq, a.id, (*batch, row, inner), b.id, (*batch, inner, column), inner), kind="float")
        if not first:
            return node
        alpha, beta = (kinds.scalar(record.kwargs.get(n, 1)) for n in ("alpha", "beta"))
        scaled = apply("mul", node, kinds.to_float(alpha)) if alpha.attr != 1 else node
        if beta.op == "const" and beta.attr == 0:
            return scaled  # torch does not read the addend then
        addend = self.arg(record.args[0], record, index)
        if beta.attr != 1:
            addend = apply("mul", addend, kinds.to_float(beta))
        total = apply("add", addend, scaled)
        return rounded_sum(self, total, addend, scaled) if record.outputs[0].dtype == torch.float16 else total

    def product_of_one(self, record: Record, index: Index) -> Node:
        """A pointwise product of two tensors as a dot over an axis of one: what einsum makes of a head dim of 1."""
        inner = self.bound_axis(record, 1, "d")
        factors = ((x.id, self.broadcast(x, index)) for x in record.args)
        return Node.make("dot", attr=(record.seq, *(part for f in factors for part in f), inner), kind="float")

    def substitute(self, node: Node, replace: dict[sympy.Symbol, sympy.Expr]) -> Node:
        """The expression with axes replaced everywhere, indices simplified again."""

        def move(expr: Any) -> Any:
            if isinstance(expr, sympy.Expr):
                return self.axes.rewrite(expr, replace)
            return tuple(move(e) for e in expr) if isinstance(expr, tuple) else expr

        def step(n: Node, args: tuple[Node, ...]) -> Node | None:
            if n.op == "sym":
                return sym(move(n.attr))
            if n.op == "join":
                return self.element(self.shadow.values[n.attr[0]], move(n.attr[1]))  # pyright: ignore
            if n.op in INDEXED or n.op in REDUCTIONS:
                return Node.make(n.op, *args, attr=move(n.attr), kind=n.kind)
            return Node.make(n.op, *args, attr=n.attr, kind=n.kind) if n.op == "narrowed" else None

        return rebuild(node, step)
