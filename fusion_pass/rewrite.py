"""Surgery on the Dynamo graph: one op in place of a described site, then what nothing needs any more is erased.

This is the only module that changes a graph.  A site is spliced in whole or not at all: everything that can refuse is asked
before the first node is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
import torch.fx.node
from fusion_kernels.op import ATTENTION
from fusion_kernels.sdpa import Form
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

from .factors import Factor
from .indexing import Div, Mod, expr_of
from .layout import Step
from .liveness import Liveness
from .match import Match
from .scores import Number, Scores
from .site import Reason, Refused
from .tape import Shadow, Value, meta_value

__all__ = ["Splicer"]

SEEDS = 2**31 - 1


class Splicer:
    """Rewrites one graph, site by site, then cleans up."""

    def __init__(self, gm: torch.fx.GraphModule, shadow: Shadow) -> None:
        self.gm, self.shadow = gm, shadow
        self.added: list[torch.fx.Node] = []
        self.replaced: dict[torch.fx.Node, torch.fx.Node] = {}
        self.liveness = Liveness(gm.graph, shadow)
        self.live = self.liveness.live()  # before anything is changed
        self.symbols = self._symbol_sources()

    def splice(self, match: Match, scores: Scores, sdpa: Form | None = None) -> torch.fx.Node:
        """Put the op in the place of `match.output`.

        Args:
            sdpa: the site as scaled_dot_product_attention, which then takes the op's place (see `plain`).

        Raises:
            Refused: (PROBABILITIES_USED, SCORES_USED) the graph needs a tensor of the site for something else;
                (MUTATION) a part inside a composite call writes in place.
        """
        target = match.output.node
        if target is None:
            raise Refused(Reason.NO_VALUES, "the product with the values lies inside a composite call", "a call of its own")
        reads = [match.q.value, match.k.value, match.v.value, *(c for c in scores.captures if isinstance(c, Value))]
        self._check_unused(match, target, reads)
        before = len(self.added)
        try:
            both, out = self._insert(match, scores, target, sdpa)
        except Exception:
            for node in reversed(self.added[before:]):
                self.gm.graph.erase_node(node)
            del self.added[before:]
            raise
        for node in self.added[before:]:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
                if key in target.meta:
                    node.meta[key] = target.meta[key]
        target.replace_all_uses_with(out)
        self.replaced[target] = out
        self.liveness.replace(target, out)
        match.output.node = out
        return both

    def _insert(
        self, match: Match, scores: Scores, target: torch.fx.Node, sdpa: Form | None
    ) -> tuple[torch.fx.Node, torch.fx.Node]:
        with self.gm.graph.inserting_before(target):
            q, k, v = (self._factor(f) for f in (match.q, match.k, match.v))
            q, k, v = (self._kept(n, f.value, match) for n, f in zip((q, k, v), (match.q, match.k, match.v), strict=True))
            captures = [
                self._kept(self._held(c), c, match) if isinstance(c, Value) else self._number(c, q) for c in scores.captures
            ]
            params = [self.size(e) for e in scores.params]
            seed = None
            if match.dropout_p:
                seed = self.call(torch.randint, 0, SEEDS, (), device=match.q.value.tensor.device)
            if sdpa is not None:
                shared = match.q.shape[1] != match.k.shape[1]
                how = {"is_causal": sdpa.causal, "scale": sdpa.scale, "enable_gqa": shared}
                both = out = self.call(scaled_dot_product_attention, q, k, v, **how)
            else:
                both = self.call(ATTENTION, q, k, v, captures, params, scores.program.text, match.dropout_p, seed)
                out = self.call(operator.getitem, both, 0)
            for step in match.out_steps:
                out = self._step(out, step)
            out = self._kept(out, match.output, match)
        return both, out

    def finish(self) -> None:
        """Erase the nodes of the fused sites that nothing needs, and those that only read them."""
        if not self.replaced:
            return
        live = self.liveness.live()
        dead = {n for n in self.live - live if n.op not in ("placeholder", "output")}
        for node in self.gm.graph.nodes:  # what was dead before, and reads what is dead now
            if node not in live and any(i in dead for i in node.all_input_nodes):
                dead.add(node)
        for node in reversed(list(self.gm.graph.nodes)):
            if node in dead and not node.users:
                self.gm.graph.erase_node(node)
        self.gm.graph.lint()
        self.gm.recompile()

    # ------------------------------------------------------------ what may go

    def _check_unused(self, match: Match, target: torch.fx.Node, reads: list[Value]) -> None:
        instead = {target: [n for value in reads for n in self._sources(value)]}
        live = self.liveness.live(instead)
        product = match.dot.attr[0]  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        softmax, end = match.anchor.record.seq, match.end
        scored = self.shadow.made_from(product, end)
        if match.draw is not None:
            self._check_mask_unused(match, scored, live)
        made = {v: v.record.seq for v in match.walked & scored if v.record is not None and v.record.seq < end}
        for value in sorted(made, key=lambda v: -made[v]):
            if value.node is None or value.node not in live or value.node is target:
                continue
            late = made[value] >= softmax
            where = _reader(value.node, live, target)
            if late:
                raise Refused(Reason.PROBABILITIES_USED, where, "probabilities that only the product with the values reads")
            raise Refused(Reason.SCORES_USED, where, "scores that only the softmax reads")

    def _check_mask_unused(self, match: Match, own: set[Value], live: set[torch.fx.Node]) -> None:
        """The dropout mask goes with the site: what else reads it would see other bits than the op draws."""
        assert match.draw is not None
        drawn = self.shadow.made_from(match.draw.record.seq, match.end)
        for value in sorted(drawn - own, key=lambda v: -v.seq):
            if value.node in live and value.node is not match.output.node:
                raise Refused(Reason.DROPOUT, _reader(value.node, live, match.output.node), "a mask for each attention")

    def _sources(self, value: Value) -> list[torch.fx.Node]:
        """The nodes that making `value` again would read."""
        if value.node is not None:
            return [self.replaced.get(value.node, value.node)]
        if value.record is None:
            raise Refused(
                Reason.NOT_EXPRESSIBLE, f"a {tuple(value.shape)} tensor that no node of the graph holds", "tensors of the graph"
            )
        if value.record.mutates:
            raise Refused(Reason.MUTATION, f"{value.record.op} in place inside a composite call", "out-of-place operations")
        return [n for v in value.record.inputs for n in self._sources(v)]

    # ------------------------------------------------------------ making nodes

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
            return self.replaced.get(value.node, value.node)
        record = value.record
        assert record is not None  # `_sources` has refused
        args, kwargs = pytree.tree_map_only(Value, self._held, (record.args, record.kwargs))
        args, kwargs = pytree.tree_map_only(torch.SymInt, lambda s: self.size(expr_of(s)), (args, kwargs))
        node = self.call(record.func, *args, **kwargs)
        return node if len(record.outputs) == 1 else self.call(operator.getitem, node, value.output)

    def _number(self, number: Number, like: torch.fx.Node) -> torch.fx.Node:
        """A 0-d tensor from the node that computes a symbolic float."""
        for node in self.gm.graph.nodes:
            value = meta_value(node)
            if isinstance(value, torch.SymFloat) and sympy.sympify(value.node.expr) == number.expr:
                q = meta_value(like)
                dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
                return self.call(torch.scalar_tensor, node, dtype=dtype, device=q.device)
        raise Refused(Reason.NOT_EXPRESSIBLE, f"the number {number.expr} is in no node of the graph", "a number of the graph")

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


def _reader(node: torch.fx.Node, live: set[torch.fx.Node], target: torch.fx.Node | None) -> str:
    user = next((u for u in node.users if u in live and u is not target), node)
    return "the graph returns them" if user.op == "output" else f"{user.name} reads them"


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
