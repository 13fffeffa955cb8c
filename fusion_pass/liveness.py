"""Which nodes of a Dynamo graph are needed, when in-place calls are judged by what they write.

A node is live if the output needs it, if it does something that the tape did not see as pure, or if it writes a storage that
a live value or an input lies on.  `FX`'s own dead code elimination knows nothing of writes to intermediate tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.fx import Graph, Node

from .tape import Record, Shadow, Value, storage_of

__all__ = ["Liveness"]


class Liveness:
    """What one graph needs, whatever sites are replaced in it: made once, asked for each site."""

    def __init__(self, graph: Graph, shadow: Shadow) -> None:
        self.holds: dict[Node, set[int]] = {}  # the storages that a node's results lie on
        self.writes: dict[Node, set[int]] = {}  # those that it writes
        for record in shadow.records:
            if record.mutates:
                self.writes.setdefault(record.node, set()).update(storage_of(v.tensor) for v in _written(record))
        for value in shadow.values:
            if value.node is not None:
                self.holds.setdefault(value.node, set()).add(storage_of(value.tensor))
        nodes = list(graph.nodes)
        self.roots = [n for n in nodes if n.op in ("output", "placeholder") or not (n in self.writes or _pure(n, shadow))]
        self.given = set().union(*(self.holds.get(n, ()) for n in nodes if n.op == "get_attr"))  # storages of constants

    def replace(self, old: Node, new: Node) -> None:
        """`new` holds now what `old` held: a write to that is a write to the result of the replacement."""
        self.holds[new] = self.holds.pop(old, set())

    def live(self, instead: Mapping[Node, Iterable[Node]] | None = None) -> set[Node]:
        """The live nodes; `instead` gives, for nodes about to be replaced, what their replacement reads.

        Nodes that were put in since are pure.
        """
        instead = instead or {}
        live: set[Node] = set()
        held = set(self.given)

        def mark(start: Node) -> None:
            stack = [start]
            while stack:
                node = stack.pop()
                if node in live:
                    continue
                live.add(node)
                held.update(self.holds.get(node, ()))
                stack.extend(instead[node] if node in instead else node.all_input_nodes)

        for node in self.roots:
            mark(node)
        while True:
            waiting = [n for n, written in self.writes.items() if n not in live and written & held]
            if not waiting:
                return live
            for node in waiting:
                mark(node)


def _written(record: Record) -> Iterable[Value]:
    for i, argument in enumerate(record.func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = record.args[i] if i < len(record.args) else record.kwargs.get(argument.name)
            yield from (v for v in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(v, Value))


def _pure(node: Node, shadow: Shadow) -> bool:
    """The tape saw all that the node does, and none of it was an assertion or the like (a call without a result)."""
    return node not in shadow.opaque and all(record.outputs for record in shadow.by_node.get(node, ()))
