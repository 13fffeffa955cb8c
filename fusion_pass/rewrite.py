"""Surgery on the Dynamo graph: one op in place of a described site, then what nothing needs any more is erased.

This is the only module that changes a graph.  A site is spliced in two steps: `prepare` puts the op before the node that it is
to stand in for, where nothing reads it yet, and may refuse; `commit` hands it to the node's readers.  Between them `together`
decides which of the prepared ones stay; the others are withdrawn and leave no trace.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import sympy
import torch
import torch.fx.node
from fusion_kernels.op import ATTENTION
from fusion_kernels.sdpa import Form
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

from .dropout import Bits
from .factors import Factor
from .indexing import Div, Mod, expr_of
from .layout import Step
from .liveness import Liveness
from .match import Match
from .scores import Number, Scores
from .site import Reason, Refused
from .strides import memory_order, noticed
from .tape import Shadow, Value, meta_value

__all__ = ["Splice", "Splicer"]

SEEDS = 2**31 - 1


@dataclass(eq=False)
class Splice:
    """A prepared site, or several of which the output is the sum: `out`, made by `added`, is to stand in for `target`."""

    matches: Sequence[Match]
    target: torch.fx.Node
    out: torch.fx.Node
    added: Sequence[torch.fx.Node]


class Splicer:
    """Rewrites one graph, site by site, then cleans up."""

    def __init__(self, gm: torch.fx.GraphModule, shadow: Shadow) -> None:
        self.gm, self.shadow = gm, shadow
        self.added: list[torch.fx.Node] = []
        self.seeds: dict[Bits, torch.fx.Node] = {}
        self.at: torch.fx.Node | None = None  # what is added stands before it
        self.stands: list[Splice] = []  # those that were committed
        self.liveness = Liveness(gm.graph, shadow)
        self.live = self.liveness.live()  # before anything is changed
        self.symbols = self._symbol_sources()

    def prepare(self, terms: Sequence[tuple[Match, Scores, Form | None]]) -> Splice:
        """Put the ops before the node that holds the output of the terms.

        Args:
            terms: each with its scores, and as scaled_dot_product_attention where that takes the op's place (see `plain`).

        Raises:
            Refused: (MUTATION) a part inside a composite call writes in place; (NO_VALUES, NOT_EXPRESSIBLE) no node holds what
                the op would read or stand in for.
        """
        matches = [match for match, _, _ in terms]
        target = matches[0].output.node
        if target is None:
            raise Refused(Reason.NO_VALUES, "the product with the values lies inside a composite call", "a call of its own")
        before, self.at = len(self.added), target
        try:
            with self.gm.graph.inserting_before(target):
                first, *others = (self._insert(*term) for term in terms)
                for other in others:
                    first = self.call(torch.add, first, other)
                out = self._kept(first, matches[0].output, matches[0])
        except Exception:
            self._erase(self.added[before:])
            raise
        finally:
            added, self.added = self.added[before:], self.added[:before]
        for node in added:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in target.meta:
                    node.meta[key] = target.meta[key]
        return Splice(matches, target, out, added)

    def commit(self, splice: Splice) -> None:
        """Let the op stand in for its target."""
        splice.target.replace_all_uses_with(splice.out)
        self.liveness.replace(splice.target, splice.out)
        splice.matches[0].output.node = splice.out
        self.stands.append(splice)

    def withdraw(self, splice: Splice) -> None:
        """Take the op out again: nothing reads it."""
        self._erase(splice.added)

    def _erase(self, nodes: Iterable[torch.fx.Node]) -> None:
        for node in reversed(list(nodes)):
            self.gm.graph.erase_node(node)

    def _insert(self, match: Match, scores: Scores, sdpa: Form | None) -> torch.fx.Node:
        q, k, v = (self._factor(f) for f in (match.q, match.k, match.v))
        q, k, v = (self._kept(n, f.value, match) for n, f in zip((q, k, v), (match.q, match.k, match.v), strict=True))
        captures = [self._capture(c, order, q, match) for c, order in zip(scores.captures, scores.orders, strict=True)]
        params = [self.size(e) for e in scores.params]
        seed = self._seed(match)
        if sdpa is not None:
            shared = match.q.shape[1] != match.k.shape[1]
            how = {"is_causal": sdpa.causal, "scale": sdpa.scale, "enable_gqa": shared}
            out = self.call(scaled_dot_product_attention, q, k, v, **how)
        else:
            both = self.call(ATTENTION, q, k, v, captures, params, scores.program.text, match.dropout_p, seed)
            out = self.call(operator.getitem, both, 0)
        for step in match.out_steps:
            out = self._step(out, step)
        return out

    def _seed(self, match: Match) -> torch.fx.Node | None:
        """The seed of the bits that the site drops by, made where its mask was: sites with one mask have one seed."""
        bits = match.bits
        if bits is None or not match.dropout_p:
            return None
        if bits not in self.seeds:
            with self.gm.graph.inserting_before(bits.record.node):
                self.seeds[bits] = self.call(torch.randint, 0, SEEDS, (), device=match.q.value.tensor.device)
            self.added.pop()  # it belongs to no site alone
        return self.seeds[bits]

    def finish(self) -> None:
        """Erase the nodes of the fused sites that nothing needs, and those that only read them."""
        self._erase(seed for seed in self.seeds.values() if not seed.users)
        if not self.stands:
            return
        live = self.liveness.live()
        dead = {n for n in self.live - live if n.op not in ("placeholder", "output")}
        for node in self.gm.graph.nodes:  # what was dead before, and reads what is dead now
            if node not in live and any(i in dead for i in node.all_input_nodes):
                dead.add(node)
        for node in reversed(list(self.gm.graph.nodes)):
            if node in dead and not node.users:
                self.gm.graph.erase_node(node)
        self._order()
        self.gm.graph.lint()
        self.gm.recompile()

    def _order(self) -> None:
        """Copy the results of which somebody notices the strides into eager's order."""
        results = {s.out: s.matches[0].output.tensor for s in self.stands}
        while found := noticed(self.gm.graph, self.shadow, results):
            for out in found:
                self._copy(out, results.pop(out))

    def _copy(self, node: torch.fx.Node, like: torch.Tensor) -> None:
        """Hand what reads a node a copy of it, in the memory order of `like`."""
        users = list(node.users)
        with self.gm.graph.inserting_before(node.next):
            copy = self._in_order(node, memory_order(like))
        for user in users:
            user.replace_input_with(node, copy)

    # ------------------------------------------------------------ making nodes

    def _in_order(self, node: torch.fx.Node, order: list[int]) -> torch.fx.Node:
        """A copy with the dims in memory in `order`, the outermost first."""
        turned = order != sorted(order)
        copy = self.call("contiguous", self.call("permute", node, *order) if turned else node)
        return self.call("permute", copy, *(order.index(i) for i in range(len(order)))) if turned else copy

    def call(self, target: Any, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """A call with its fake value; `target` a function, or the name of a tensor method."""
        make: Callable = self.gm.graph.call_method if isinstance(target, str) else self.gm.graph.call_function
        node = make(target, args, kwargs)
        fakes, fake_kwargs = torch.fx.node.map_arg((args, kwargs), meta_value)
        mode = self.shadow.values[0].tensor.fake_mode  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad(), mode:
            node.meta["example_value"] = (
                getattr(fakes[0], target)(*fakes[1:], **fake_kwargs) if isinstance(target, str) else target(*fakes, **fake_kwargs)
            )
        self.added.append(node)
        return node

    def _held(self, value: Value) -> torch.fx.Node:
        """The node that holds a value; inside a composite call, the ATen calls that make it, repeated."""
        if value.node is not None:
            return value.node
        record = value.record
        if record is None:
            seen = f"a {tuple(value.shape)} tensor that no node of the graph holds"
            raise Refused(Reason.NOT_EXPRESSIBLE, seen, "tensors of the graph")
        if record.mutates:
            raise Refused(Reason.MUTATION, f"{record.op} in place inside a composite call", "out-of-place operations")
        args, kwargs = pytree.tree_map_only(Value, self._held, (record.args, record.kwargs))
        args, kwargs = pytree.tree_map_only((torch.SymInt, torch.SymFloat), self.scalar, (args, kwargs))
        node = self.call(record.func, *args, **kwargs)
        return node if len(record.outputs) == 1 else self.call(operator.getitem, node, value.output)

    def _capture(self, what: Value | Number, order: list[int] | None, q: torch.fx.Node, match: Match) -> torch.fx.Node:
        if isinstance(what, Number):
            return self._number(what, q)
        node = self._kept(self._held(what), what, match)
        return node if order is None else self._in_order(node, order)

    def _number(self, number: Number, like: torch.fx.Node) -> torch.fx.Node:
        """A 0-d tensor of a symbolic float."""
        q = meta_value(like)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return self.call(torch.scalar_tensor, self.number(number.expr), dtype=dtype, device=q.device)

    def _kept(self, node: torch.fx.Node, value: Value, match: Match) -> torch.fx.Node:
        """A copy, where something writes the tensor later: the op needs its inputs and its result again in the backward."""
        late = self.shadow.written_between(value, match.end, float("inf"))
        return self.call("clone", node) if late else node

    def _factor(self, factor: Factor) -> torch.fx.Node:
        node = self._held(factor.value)
        for dtype in factor.casts:
            node = self.call("to", node, dtype)
        for step in factor.steps:
            node = self._step(node, step)
        return node

    def _step(self, node: torch.fx.Node, step: Step) -> torch.fx.Node:
        name, *args = step
        plain = [self._sizes(a) for a in args]
        if name in ("permute", "expand", "reshape"):
            (sizes,) = plain
            return self.call(name, node, *sizes)
        return self.call(name, node, *plain)

    def _sizes(self, arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [self._sizes(a) for a in arg]
        return self.size(arg) if isinstance(arg, sympy.Expr) else arg

    # ------------------------------------------------------------ symbolic sizes

    def _symbol_sources(self) -> dict[sympy.Symbol, tuple[torch.fx.Node, int | None]]:
        """Where a shape symbol can be read: an integer input, or a dim of a tensor input."""
        found: dict[sympy.Symbol, tuple[torch.fx.Node, int | None]] = {}
        inputs = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            value = meta_value(node)
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                found.setdefault(value.node.expr, (node, None))
        for node in inputs:
            value = meta_value(node)
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found.setdefault(size.node.expr, (node, dim))
        return found

    def size(self, expr: Any) -> int | torch.fx.Node:
        """A size expression as a node over the graph's inputs; plain numbers stay numbers."""
        expr = self.shadow.plain(sympy.sympify(expr))
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            source = self.symbols.get(expr)
            if source is None:
                raise Refused(
                    Reason.NOT_EXPRESSIBLE, f"the size {expr} cannot be read from an input", "sizes of the graph's inputs"
                )
            node, dim = source
            return node if dim is None else self.call("size", node, dim)
        fold = _SIZE_OPS.get(type(expr).__name__)
        if fold is None and not (expr.is_Pow and expr.exp.is_Integer and expr.exp > 0):
            raise Refused(Reason.NOT_EXPRESSIBLE, f"the size {expr}", "sums, products and quotients of sizes")
        args: Iterable[Any] = [expr.base] * int(expr.exp) if expr.is_Pow else expr.args
        first, *rest = [self.size(a) for a in args]
        for other in rest:
            first = self.call(operator.mul if expr.is_Pow else fold, first, other)
        return first

    def number(self, expr: Any) -> float | torch.fx.Node:
        """A float expression of sizes as a node: the one that the graph has, or a new one."""
        for node in takewhile(lambda n: n is not self.at, self.gm.graph.nodes):
            value = meta_value(node)
            if isinstance(value, torch.SymFloat) and sympy.sympify(value.node.expr) == expr:
                return node
        if expr.is_number:
            return float(expr)
        name = type(expr).__name__
        if name == "ToFloat":
            return self.call(torch.sym_float, self.size(expr.args[0]))
        fold = _FLOAT_OPS.get(name)
        if fold is None:
            raise Refused(Reason.NOT_EXPRESSIBLE, f"the number {expr}", "sums, products, powers and quotients of sizes")
        first, *rest = [self.number(a) for a in expr.args]
        for other in rest:
            first = self.call(fold, first, other)
        return first

    def scalar(self, x: torch.SymInt | torch.SymFloat) -> int | float | torch.fx.Node:
        """A symbolic number as the argument of a call."""
        return self.size(expr_of(x)) if isinstance(x, torch.SymInt) else self.number(x.node.expr)


_FLOAT_OPS = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloatPow": operator.pow,
    "FloatTrueDiv": operator.truediv,
    "IntTrueDiv": operator.truediv,
}
_SIZE_OPS = {
    "Add": operator.add,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    Div.__name__: operator.floordiv,
    Mod.__name__: operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}
