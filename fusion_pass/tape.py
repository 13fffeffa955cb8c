"""The tape: every ATen call of one graph over fake tensors, the values between them, and what can be asked of the whole.

`shadow` writes it; everything else reads it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
import torch.fx
from torch.utils import _pytree as pytree

from .sizes import sizes_of

__all__ = ["Record", "Shadow", "Value", "meta_value", "storage_of"]


@dataclass(eq=False)
class Value:
    """One tensor value: the result of one ATen call, an input of the graph, or what an unseen write left behind."""

    id: int
    tensor: torch.Tensor  # fake
    record: Record | None  # None: an input, the result of an opaque node, or a tensor changed through an alias
    output: int = 0  # which result of the record
    node: torch.fx.Node | None = None  # the Dynamo node that holds it, None inside a composite call
    seq: int = 0
    differentiable: bool = False  # whether something that may need a gradient is read below
    before: Value | None = None  # what the tensor held before a write through an alias changed it

    def __repr__(self) -> str:
        return f"Value({self.id}, {tuple(self.shape)}, {self.node or self.record})"

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


@dataclass(eq=False)
class Record:
    """One ATen call. `args`/`kwargs` hold `Value`s in place of tensors. `op` is the functional name of an in-place call."""

    seq: int
    func: Any  # torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: torch.fx.Node  # the Dynamo node that made the call
    outputs: list[Value] = field(default_factory=list)
    mutates: bool = False
    grad: bool = True  # whether grad mode was on
    library: str = ""  # "plain" or "masked": part of a call of the library's attention that torch runs as one kernel (`library`)

    @cached_property
    def op(self) -> str:
        """ "mul.Tensor" for both `aten.mul.Tensor` and `aten.mul_.Tensor`."""
        packet = self.func.overloadpacket.__name__
        if self.mutates and packet.endswith("_"):
            packet = packet[:-1]
        return f"{packet}.{self.func._overloadname}"

    def __repr__(self) -> str:
        return f"Record({self.seq}, {self.op}, {self.node})"

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """The tensors whose elements are read: ``zeros_like(x)`` reads none."""
        if "_like." in self.op or self.op.startswith("new_"):
            return ()
        return tuple(x for x in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(x, Value))


@dataclass
class Shadow:
    """The tape of one graph."""

    graph: torch.fx.Graph
    values: list[Value] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    results: dict[torch.fx.Node, Value] = field(default_factory=dict)  # Dynamo node -> the value that it returns
    returned: dict[torch.fx.Node, Any] = field(default_factory=dict)  # Dynamo node -> all that it returns (fake)
    opaque: set[torch.fx.Node] = field(default_factory=set)  # nodes taken as given: the tape did not see what they do
    writes: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # storage -> seq of each write
    by_node: dict[torch.fx.Node, list[Record]] = field(default_factory=lambda: defaultdict(list))

    def written_between(self, value: Value, start: int, end: float) -> bool:
        """Whether the storage of `value` is written after `start` and before `end`."""
        return any(start < w < end for w in self.writes.get(storage_of(value.tensor), ()))

    @cached_property
    def readers(self) -> dict[Value, list[Record | Value]]:
        """Who reads a value; a write through an alias makes the new value a reader of the old one."""
        users: dict[Value, list[Record | Value]] = {}
        for record in self.records:
            for value in record.inputs:
                users.setdefault(value, []).append(record)
        for value in self.values:
            if value.before is not None:
                users.setdefault(value.before, []).append(value)
        return users

    def between(self, start: int, end: int) -> list[Record]:
        """The calls from number `start` to number `end`, both included."""
        first = bisect_left(self.records, start, key=lambda r: r.seq)
        return self.records[first : bisect_right(self.records, end, key=lambda r: r.seq)]

    def made_from(self, seq: int, end: int, without: Container[torch.fx.Node | None] = ()) -> set[Value]:
        """The results of call number `seq`, and all that is computed from them up to call number `end`.

        without: nodes whose results are left out, with what is computed from those alone.
        """
        found: set[Value] = set()
        for record in self.between(seq, end):
            if record.seq == seq or any(v in found for v in record.inputs):
                found.update(v for v in record.outputs if v.node not in without)
        return found

    def plain(self, size: sympy.Expr) -> sympy.Expr:
        """A size over the graph's own symbols, for whoever computes it: see `Sizes.normal` for the form that is compared."""
        shape_env = self.values[0].tensor.fake_mode.shape_env  # pyright: ignore[reportAttributeAccessIssue]
        return size if shape_env is None else sizes_of(shape_env).plain(size)


def meta_value(node: torch.fx.Node) -> Any:
    """The fake value of a node: Dynamo keeps it in `example_value`, export and AOTAutograd in `val`."""
    return node.meta.get("example_value", node.meta.get("val"))


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
