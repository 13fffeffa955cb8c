"""Strides: who would notice that the op's result lies in memory otherwise than eager's.

The op writes its result in the memory order of the queries, so that the transpose and reshape after it are free; eager's
product is contiguous. Mostly nobody sees the difference: two calls later the strides are eager's again. But a ``view`` may
fail on what it could view, a call that opens no source to us may count on the order, and the caller gets tensors whose
strides torch.compile promises to be eager's. Such a result is copied into eager's order (`rewrite`).

What is asked is asked of fake tensors: from each result downwards, as far as strides differ from those that Dynamo recorded.
"""

# sympy is not typed
# pyright: reportArgumentType=false
from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cmp_to_key
from typing import Any

import torch
import torch.fx.node
from fusion_kernels.op import ATTENTION
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from .indexing import expr_of, same
from .layout import larger
from .tape import Shadow, meta_value, storage_of

__all__ = ["memory_order", "noticed", "same_strides"]

_ASKING = frozenset({"stride", "is_contiguous", "data_ptr", "storage_offset", "as_strided", "untyped_storage"})


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Provably the same place for each element; dims of one element have none."""
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(expr_of(size) == 1 or same(expr_of(s), expr_of(t)) for size, s, t in sizes)


def memory_order(x: Tensor) -> list[int]:
    """The dims of `x` from the outermost in memory to the innermost; equal strides in the order of the dims."""
    strides = [(expr_of(stride), expr_of(stride)) for stride in x.stride()]
    return sorted(range(x.ndim), key=cmp_to_key(lambda i, j: larger(strides[i], strides[j])))


def noticed(graph: torch.fx.Graph, shadow: Shadow, results: Mapping[Node, Tensor]) -> set[Node]:
    """Those of `results`, nodes with what eager has in their place (fake), of which somebody notices the strides."""
    new: dict[Node, Any] = {}  # node -> its value as it is now, where its strides are not those recorded
    origins: dict[Node, frozenset[Node]] = {}
    found: set[Node] = set()
    for node in graph.nodes:
        changed = [i for i in node.all_input_nodes if i in new]
        if not changed and node not in results:
            continue
        above = frozenset[Node]().union(*(origins[i] for i in changed))
        if changed and _asks(node, changed, shadow):
            found |= above
            continue
        try:
            value = _again(node, new, shadow) if changed else meta_value(node)
        except Exception:  # a view of what cannot be viewed so; whatever it is, eager's strides are right
            found |= above
            continue
        if not _alike(value, results[node] if node in results else meta_value(node)):
            new[node] = value
            origins[node] = frozenset({node}) if node in results else above
    return found


def _asks(node: Node, changed: Iterable[Node], shadow: Shadow) -> bool:
    """Whether strides may decide what a node does: it leaves the graph, cannot be looked into, or something is written."""
    if node.op not in ("call_function", "call_method") or str(node.target) in _ASKING:
        return True
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    namespace = getattr(node.target, "namespace", "aten") if isinstance(node.target, torch._ops.OpOverload) else "aten"
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        namespace = node.target._qualified_op_name.partition("::")[0]
    if namespace not in ("aten", "prims") and node.target is not ATTENTION:
        return True
    values = [v for n in (node, *changed) if (v := shadow.results.get(n)) is not None]
    return any(shadow.writes.get(storage_of(v.tensor)) for v in values)


def _again(node: Node, new: Mapping[Node, Any], shadow: Shadow) -> Any:
    """What a node gives for its inputs as they are now."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: new[n] if n in new else meta_value(n))
    mode = shadow.values[0].tensor.fake_mode  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad(), mode:
        return getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)  # pyright: ignore


def _alike(value: Any, eager: Any) -> bool:
    """Whether all tensors of a result lie in memory as eager's do."""
    pairs = zip(tree_leaves(value), tree_leaves(eager), strict=True)
    return all(same_strides(x, e) for x, e in pairs if isinstance(x, Tensor) and isinstance(e, Tensor))
