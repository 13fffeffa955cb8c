"""Which nodes of a Dynamo graph are needed, when in-place calls are judged by what they write.

A node is live if the output needs it, if it does something that the tape did not see as pure, or if it writes a storage that
a live value or an input lies on.  `FX`'s own dead code elimination knows nothing of writes to intermediate tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.fx import Graph, Node

from .tape import Shadow

__all__ = ["live_nodes", "storages_of"]


def storages_of(shadow: Shadow) -> tuple[dict[Node, set[int]], dict[Node, set[int]]]:
    """For each node the storages that its results lie on, and those that it writes."""
    holds: dict[Node, set[int]] = {}
    writes: dict[Node, set[int]] = {}
    for node, records in shadow.by_node.items():
        for record in records:
            if record.mutates:
                writes.setdefault(node, set()).update(v.tensor.untyped_storage()._cdata for v in _written(record))
    for value in shadow.values:
        if value.node is not None:
            holds.setdefault(value.node, set()).add(value.tensor.untyped_storage()._cdata)
    return holds, writes


def _written(record) -> Iterable:
    for i, argument in enumerate(record.func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = record.args[i] if i < len(record.args) else record.kwargs.get(argument.name)
            yield from (v for v in (given if isinstance(given, (list, tuple)) else [given]) if hasattr(v, "tensor"))


def live_nodes(
    graph: Graph, shadow: Shadow, instead: Mapping[Node, Iterable[Node]] | None = None, added: Iterable[Node] = ()
) -> set[Node]:
    """The live nodes; `instead` gives, for nodes about to be replaced, what their replacement reads.

    added: nodes put in since the tape was made (pure).
    """
    instead, added = instead or {}, set(added)
    holds, writes = storages_of(shadow)
    live: set[Node] = set()
    held: set[int] = set()

    def mark(start: Node) -> None:
        stack = [start]
        while stack:
            node = stack.pop()
            if node in live:
                continue
            live.add(node)
            held.update(holds.get(node, ()))
            stack.extend(instead.get(node, node.all_input_nodes))

    for node in graph.nodes:
        if node.op in ("output", "placeholder") or (node not in added and not _pure(node, shadow) and node not in writes):
            mark(node)
        if node.op == "get_attr":
            held.update(holds.get(node, ()))
    while True:
        waiting = [n for n, written in writes.items() if n not in live and written & held]
        if not waiting:
            return live
        for node in waiting:
            mark(node)


def _pure(node: Node, shadow: Shadow) -> bool:
    """The tape saw all that the node does, and none of it was an assertion or the like (a call without a result)."""
    return node not in shadow.opaque and all(record.outputs for record in shadow.by_node.get(node, ()))
