"""The shadow: a Dynamo graph run once over fake tensors, and every ATen call that it makes written down.

Analysis happens on the tape, surgery on the Dynamo graph.  The tape sees what the user's spelling comes to after autocast,
composite decomposition and broadcasting (einsum -> permute, bmm; matmul -> expand, view, bmm), with each value tied to the
Dynamo node that holds it at run time.  In-place calls give a new value for the same tensor; a write that reaches a tensor
through an alias is recorded against the storage, so that nothing stale is ever read.
"""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx.node
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingImports]
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import library
from .site import Reason, Refused
from .tape import Record, Shadow, Value, meta_value, storage_of

__all__ = ["trace"]


_OPAQUE_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class _Opaque(Exception):
    """This node's result depends on data or on code that the tape does not follow: take its value as given."""


class _Recorder(TorchDispatchMode):
    """Writes each ATen call of the current node on the tape."""

    def __init__(self, shadow: Shadow) -> None:
        super().__init__()
        self.shadow = shadow
        self.node: torch.fx.Node | None = None
        self.library = ""
        self.seq = 0
        self.current: dict[int, Value] = {}  # id(tensor) -> its value now
        self.aliases: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)  # storage -> tensors on it

    def value_of(self, tensor: torch.Tensor) -> Value:
        value = self.current.get(id(tensor))
        return value if value is not None else self.define(tensor, None)

    def define(self, tensor: torch.Tensor, record: Record | None, output: int = 0) -> Value:
        value = Value(len(self.shadow.values), tensor, record, output, seq=self.seq)
        value.differentiable = record is not None and tensor.is_floating_point() and any(v.differentiable for v in record.inputs)
        self.shadow.values.append(value)
        self.current[id(tensor)] = value
        if tensor.layout == torch.strided:
            self.aliases[storage_of(tensor)][id(tensor)] = tensor
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _OPAQUE_TAGS):
            raise _Opaque(str(func))
        if func.namespace == "aten" and func._can_decompose():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if library.is_kernel(func):
            return self._attention(func, args, kwargs)
        out = func(*args, **kwargs)
        if self.node is not None and func.namespace != "prim":
            self._write(func, args, kwargs, out)
        return out

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        assert self.node is not None
        self.seq += 1
        to_value = lambda x: self.value_of(x) if isinstance(x, torch.Tensor) else x
        value_args, value_kwargs = pytree.tree_map(to_value, (args, kwargs))
        mutated = _mutated(func, args, kwargs)
        record = Record(
            self.seq, func, value_args, value_kwargs, self.node,
            mutates=bool(mutated), grad=torch.is_grad_enabled(), library=self.library,
        )  # fmt: skip
        for tensor in mutated:
            self._note_write(tensor)
        for i, tensor in enumerate(pytree.tree_leaves(out)):
            if isinstance(tensor, torch.Tensor):
                record.outputs.append(self.define(tensor, record, i))
        self.shadow.records.append(record)
        self.shadow.by_node[self.node].append(record)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """The results of a kernel of the library's attention; the first as it is made of products (see `library`)."""
        given = library.arguments(func, args, kwargs)
        own, *others = func(*args, **kwargs)
        mask = self.value_of(given["mask"]) if given.get("mask") is not None else None
        self.library = library.kind_of(mask)
        chosen = library.visible(mask)
        try:
            with self:
                if mask is not None and chosen is not None:
                    seen, positive = chosen
                    given["mask"] = (seen.tensor if positive else ~seen.tensor).expand(mask.shape)
                return library.laid_out_as(library.in_products(**given), own), *others
        finally:
            self.library = ""

    def _note_write(self, tensor: torch.Tensor) -> None:
        """Every other tensor on the storage now holds something that the tape did not see being computed."""
        storage = storage_of(tensor)
        self.shadow.writes[storage].append(self.seq)
        for other in list(self.aliases[storage].values()):
            old = self.current.get(id(other))
            new = self.define(other, None)
            if old is not None:
                new.node, new.before, new.differentiable = old.node, old, True


def _mutated(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    if not func._schema.is_mutable:
        return []
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        found += [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
    return found


def _is_scalar_math(node: torch.fx.Node) -> bool:
    """Sizes and arithmetic on them: the meta value is exact, nothing needs to run."""
    return isinstance(meta_value(node), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


class _Runner:
    def __init__(self, gm: torch.fx.GraphModule, fake_mode: FakeTensorMode, body: bool) -> None:
        self.gm, self.fake_mode, self.body = gm, fake_mode, body
        self.shadow = Shadow(gm.graph)
        self.recorder = _Recorder(self.shadow)
        self.env: dict[torch.fx.Node, Any] = {}

    def run(self) -> Shadow:
        depth = 0  # of function transforms (vmap, grad, ...): what runs inside them is not followed
        for node in self.gm.graph.nodes:
            if node.op == "output":
                break
            self.recorder.node = node
            name = str(getattr(node.target, "__name__", ""))
            depth += name.endswith("_increment_nesting")
            try:
                result = self._opaque(node) if depth else self._run_node(node)
            except _Opaque:
                result = self._opaque(node)
            depth -= name.endswith("_decrement_nesting")
            self.env[node] = result
            self._tie(node, result)
        self.recorder.node = None
        return self.shadow

    def _run_node(self, node: torch.fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(meta_value(node))
        if node.op == "get_attr":
            return self._input(operator.attrgetter(str(node.target))(self.gm))
        if _is_scalar_math(node):
            return meta_value(node)
        if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise _Opaque(str(node.target))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        with self.recorder:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def _input(self, value: Any) -> Any:
        """Inputs without autograd history; a real tensor (a lifted constant) is made fake."""
        if isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value):
            return None  # lives inside a function transform only
        if isinstance(value, FakeTensor):
            return value.detach() if value.fake_mode is self.fake_mode else value
        if isinstance(value, torch.Tensor):
            return self.fake_mode.from_tensor(value.detach(), static_shapes=True)
        return value

    def _differentiable(self, node: torch.fx.Node, tensor: torch.Tensor) -> bool:
        """Whether an input, or the result of an opaque node, may need a gradient; what a body is given is not known."""
        if not tensor.is_floating_point():
            return False
        given = meta_value(node) if node.op != "get_attr" else operator.attrgetter(str(node.target))(self.gm)
        known = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
        return self.body or any(t.requires_grad for t in known)

    def _opaque(self, node: torch.fx.Node) -> Any:
        self.shadow.opaque.add(node)
        value = meta_value(node)
        if value is None and node.users:
            raise Refused(Reason.CAPTURE, f"the result of {node.format_node()} is not known")
        return pytree.tree_map(self._input, value)

    def _tie(self, node: torch.fx.Node, result: Any) -> None:
        """The first node that returns a value holds it."""
        self.shadow.returned[node] = result
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                value = self.recorder.value_of(tensor)
                if value.record is None and value.node is None and value.before is None:
                    value.differentiable = self._differentiable(node, tensor)
                if tensor is result:
                    self.shadow.results[node] = value
                    value.node = value.node or node


def trace(gm: torch.fx.GraphModule, body: bool = False) -> Shadow:
    """Run `gm` (a Dynamo graph, or with `body` the body of a higher-order op) over its fake inputs and return the tape.

    Raises:
        Refused: (CAPTURE) the graph holds no fake values, or a node cannot be run on them.
    """
    fakes = [meta_value(n) for n in gm.graph.nodes if n.op == "placeholder" or "example_value" in n.meta]
    fakes = [f for f in pytree.tree_leaves(fakes) if isinstance(f, FakeTensor)]
    if not fakes:
        raise Refused(Reason.CAPTURE, "the graph has no tensor inputs")
    fake_mode = fakes[0].fake_mode  # not the tracing context's: Dynamo gives backends a fresh one there
    shape_env = fake_mode.shape_env
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing(TracingContext(fake_mode)))
        if shape_env is not None:
            stack.enter_context(shape_env.suppress_guards())
            stack.enter_context(shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(_restored_modes())
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(fake_mode)
        try:
            return _Runner(gm, fake_mode, body).run()
        except Refused:
            raise
        except Exception as error:
            raise Refused(Reason.CAPTURE, f"{type(error).__name__}: {str(error)[:300]}") from error


@contextlib.contextmanager
def _restored_modes() -> Iterator[None]:
    """A graph may switch grad mode and autocast and be cut before it switches them back."""
    grad = torch.is_grad_enabled()
    rng = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_rng_state(rng)
        torch.clear_autocast_cache()
