"""Evaluates the nodes of a score program on torch tensors (or on plain Python numbers), over a box of (b, h, q, k).

Every value keeps the smallest shape that broadcasts: an index or a mask over (q, k) is computed once for all heads, and a
captured tensor that is read at plain indices is sliced, never gathered.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .program import Node, postorder

__all__ = ["Box", "Environment", "evaluate", "integer", "scatter"]

AXES = {"b": 0, "h": 1, "q": 2, "k": 3}


@dataclass(frozen=True)
class Box:
    """The elements looked at: half-open ranges of b, h, q, k."""

    b: tuple[int, int]
    h: tuple[int, int]
    q: tuple[int, int]
    k: tuple[int, int]

    def range(self, name: str) -> tuple[int, int]:
        return getattr(self, name)


@dataclass
class Environment:
    """What the leaves stand for.

    Args:
        box: the elements looked at; tensors broadcast to (b, h, q, k) over it.
        sizes: the whole problem's "B H N M".
        captures: the captured tensors, whole.
        params: integer parameters.
        dtype: what ``float`` nodes are computed in.
        device: of the index tensors.
        score: raw scores over the box, in `dtype`; None if not read.
        grad: the cotangent of the root over the box, in derivative expressions.
    """

    box: Box
    sizes: Mapping[str, int]
    captures: Sequence[torch.Tensor]
    params: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    score: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    values: dict[Node, Any] = field(default_factory=dict)

    @cached_property
    def indices(self) -> dict[str, torch.Tensor]:
        shapes = {"b": (-1, 1, 1, 1), "h": (-1, 1, 1), "q": (-1, 1), "k": (-1,)}
        return {n: torch.arange(*self.box.range(n), device=self.device).view(s) for n, s in shapes.items()}


# ---------------------------------------------------------------- operations

_OPERATORS: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs,
    "floordiv": operator.floordiv, "mod": operator.mod,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip

_NUMBERS: dict[str, Callable] = {
    **_OPERATORS,
    "maximum": lambda a, b: a if a > b or a != a else b,  # NaN wins
    "minimum": lambda a, b: a if a < b or a != a else b,
    "not": operator.not_,
    "where": lambda p, a, b: a if p else b,
    "to_float": float,
    "to_int": int,
    "to_bool": bool,
    "isnan": math.isnan,
    "isinf": math.isinf,
}

_TENSORS: dict[str, Callable] = {
    **_OPERATORS,
    "div": lambda a, b: torch.div(*_tensors(a, b)),  # torch takes a number over x as the number times 1 / x
    "pow": torch.pow,
    "not": torch.logical_not,
    "maximum": lambda a, b: torch.maximum(*_tensors(a, b)),
    "minimum": lambda a, b: torch.minimum(*_tensors(a, b)),
    "to_int": lambda x: x.to(torch.int64),
    "to_bool": lambda x: x != 0,
    **{n: getattr(torch, n) for n in (
        "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf", "floor", "ceil", "trunc", "log1p", "expm1",
        "isnan", "isinf",
    )},
}  # fmt: skip


def _tensors(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    like = a if isinstance(a, torch.Tensor) else b
    return tuple(x if isinstance(x, torch.Tensor) else like.new_tensor(x) for x in (a, b))  # type: ignore[return-value]


def _apply(node: Node, args: list[Any], env: Environment) -> Any:
    op = node.op
    if not any(isinstance(a, torch.Tensor) for a in args):
        if op in _NUMBERS:
            return _NUMBERS[op](*args)
        args = [torch.tensor(float(a), dtype=torch.float64) for a in args]  # IEEE: 1 / 0 is inf, log(-1) is NaN
        return _apply(node, args, env).item()
    if op == "where":
        p, a, b = args
        if not isinstance(p, torch.Tensor):
            return a if p else b
        if node.kind == "float" and not (isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor)):
            b = torch.tensor(b, dtype=env.dtype, device=p.device)
        return torch.where(p, a, b)
    if op == "to_float":
        return args[0].to(env.dtype)
    if op in ("round_float16", "round_bfloat16"):
        return args[0].to(torch.float16 if op == "round_float16" else torch.bfloat16).to(args[0].dtype)
    return _TENSORS[op](*args)


# ---------------------------------------------------------------- loads


def _axes(node: Node) -> tuple[Any, ...] | None:
    """The plan of a load that is a slice: for each dim an axis name or an integer; None if it has to gather."""
    plan: list[Any] = []
    for a in node.args:
        if a.op == "index" and a.attr in AXES and a.attr not in plan:
            plan.append(a.attr)
        elif a.op == "const":
            plan.append(int(a.attr))  # type: ignore[call-overload]
        else:
            return None
    return tuple(plan)


def _view(tensor: torch.Tensor, plan: tuple[Any, ...], box: Box) -> torch.Tensor:
    """The slice of `tensor` that `plan` reads over the box, as (b, h, q, k) with 1 for the axes not read."""
    key = tuple(slice(*box.range(p)) if isinstance(p, str) else p for p in plan)
    names = [p for p in plan if isinstance(p, str)]
    out = tensor[key]
    out = out.permute(sorted(range(len(names)), key=lambda i: AXES[names[i]]))
    for name, axis in AXES.items():
        if name not in names:
            out = out.unsqueeze(axis)
    return out


def _load(node: Node, args: list[Any], env: Environment) -> torch.Tensor:
    tensor = env.captures[node.attr]  # type: ignore[index]
    plan = _axes(node)
    out = tensor[tuple(args)] if plan is None else _view(tensor, plan, env.box)
    return out.to(env.dtype) if node.kind == "float" else out.to(torch.int64) if node.kind == "int" else out


def _reduce(grad: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`grad` summed to `shape` over the dims that `shape` broadcasts."""
    lead = grad.dim() - len(shape)
    dims = [i for i in range(grad.dim()) if i < lead or (shape[i - lead] == 1 and grad.shape[i] != 1)]
    return (grad.sum(dims, keepdim=True) if dims else grad).reshape(shape)


def scatter(node: Node, grad: torch.Tensor, into: torch.Tensor, env: Environment) -> None:
    """Adds `grad`, the cotangent of the load `node` over the box, to the tensor that it was read from."""
    plan = _axes(node)
    full = tuple(hi - lo for lo, hi in (env.box.range(n) for n in AXES))
    if plan is not None:
        view = _view(into, plan, env.box)
        grad = grad.expand(full)
        view += _reduce(grad, view.shape).to(view.dtype)
        return
    keys = [a if isinstance(a, torch.Tensor) else torch.tensor(a, device=into.device) for a in evaluate(node.args, env)]
    shape = torch.broadcast_shapes(*(a.shape for a in keys))
    reduced = _reduce(grad.expand(full), (*(1,) * (4 - len(shape)), *shape)).reshape(shape)
    into.index_put_(tuple(k.expand(shape) for k in keys), reduced.to(into.dtype), accumulate=True)


# ---------------------------------------------------------------- evaluation


def _leaf(node: Node, env: Environment) -> Any:
    if node.op == "const":
        return node.attr
    if node.op == "index":
        return env.indices[node.attr]  # type: ignore[index]
    if node.op == "size":
        return env.sizes[node.attr]  # type: ignore[index]
    if node.op == "param":
        return env.params[node.attr]  # type: ignore[index]
    return env.score if node.op == "score" else env.grad


def evaluate(roots: Sequence[Node], env: Environment) -> list[Any]:
    """The values of `roots`: tensors that broadcast over the box, or numbers. Values are kept in `env` for the next call."""
    values = env.values
    for node in postorder(*(r for r in roots if r not in values)):
        if node in values:
            continue
        args = [values[a] for a in node.args]
        values[node] = _load(node, args, env) if node.op == "load" else _apply(node, args, env) if args else _leaf(node, env)
    return [values[r] for r in roots]


def integer(node: Node, sizes: Mapping[str, int], params: Sequence[int], indices: Mapping[str, int]) -> int:
    """The value of an integer (or bool) expression of numbers alone: a tile bound."""
    values: dict[Node, Any] = {}
    for n in postorder(node):
        if n.op == "const":
            values[n] = n.attr
        elif n.op == "index":
            values[n] = indices[n.attr]  # type: ignore[index]
        elif n.op == "size":
            values[n] = sizes[n.attr]  # type: ignore[index]
        elif n.op == "param":
            values[n] = params[n.attr]  # type: ignore[index]
        else:
            values[n] = _NUMBERS[n.op](*(values[a] for a in n.args))
    return values[node]
