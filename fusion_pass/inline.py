"""A composite call opened up: the ATen calls that the tape saw it make, put in its place.

Needed where attention lies inside one call, as in ``F.multi_head_attention_forward``: the pass cuts between calls, not
inside them. The ATen calls are what is left of it once autocast has had its say: what it casts is a call of its own among them,
and what it does not (inside of ``scaled_dot_product_attention`` it is off) must not be cast now: they stand in a region without.
"""

from __future__ import annotations

import operator
from itertools import takewhile
from typing import Any

import torch
import torch.fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.utils import _pytree as pytree

from .rewrite import Splicer
from .site import Reason, Refused
from .tape import Shadow, Value

__all__ = ["OPENED", "copy_graph", "inline"]

OPENED = "fusion_pass_opened"  # node.meta: the name of the composite call that the node was part of


def copy_graph(graph: torch.fx.Graph) -> torch.fx.Graph:
    """The same nodes with the same names and meta, to go back to."""
    new = torch.fx.Graph(graph.owning_module, graph._tracer_cls, graph._tracer_extras)
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = new.node_copy(node, mapping.__getitem__)
    new._codegen = graph._codegen
    return new


def inline(gm: torch.fx.GraphModule, shadow: Shadow, node: torch.fx.Node) -> None:
    """Replace `node` by its ATen calls.

    Raises:
        Refused: a result of the call is not one that its ATen calls make.
    """
    splicer = Splicer(gm, shadow)
    splicer.at = node
    made: dict[Value, torch.fx.Node] = {}

    def argument(x: Any) -> Any:
        if isinstance(x, Value):
            return made[x] if x in made else x.node
        return splicer.scalar(x) if isinstance(x, (torch.SymInt, torch.SymFloat)) else x

    values = {id(v.tensor): v for r in shadow.by_node[node] for v in r.outputs}
    device = next((v.tensor.device.type for r in shadow.by_node[node] for v in r.outputs), "cpu")
    with gm.graph.inserting_before(node), torch.autocast(device, enabled=False):
        entered = None
        if _autocast_at(gm.graph, node, device):
            entered = gm.graph.call_function(_enter_autocast, (device, None, False, None))
        for record in shadow.by_node[node]:
            args, kwargs = pytree.tree_map(
                argument, (record.args, record.kwargs), is_leaf=lambda x: isinstance(x, (Value, torch.SymInt, torch.SymFloat))
            )
            call = splicer.call(record.func, *args, **kwargs)
            several = isinstance(call.meta["example_value"], (tuple, list))
            for value in record.outputs:
                made[value] = splicer.call(operator.getitem, call, value.output) if several else call
        if entered is not None:
            gm.graph.call_function(_exit_autocast, (entered,))
    for new in splicer.added:
        new.meta[OPENED] = node.name
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
    result = pytree.tree_map(lambda t: made.get(values.get(id(t))) if isinstance(t, torch.Tensor) else t, shadow.returned[node])  # pyright: ignore
    for user in list(node.users):
        if isinstance(result, torch.fx.Node):
            user.replace_input_with(node, result)
            continue
        if user.target is not operator.getitem or not isinstance(result[user.args[1]], torch.fx.Node):
            raise Refused(Reason.LAYOUT, f"the results of {node.name} are used as a whole")
        user.replace_all_uses_with(result[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _autocast_at(graph: torch.fx.Graph, node: torch.fx.Node, device: str) -> bool:
    """Whether autocast is on where `node` stands: by the last region of the graph that is open there, else by the caller's."""
    open_: dict[torch.fx.Node, bool] = {}
    for other in takewhile(lambda n: n is not node, graph.nodes):
        if other.target is _enter_autocast and other.args[0] == device:
            open_[other] = bool(other.args[2])
        elif other.target is _exit_autocast:
            open_.pop(other.args[0], None)  # pyright: ignore[reportArgumentType]
    return [torch.is_autocast_enabled(device), *open_.values()][-1]
