"""How many attentions a model runs, counted without the plugin: softmaxes that lie between two products of matrices.

`Counter` is a dispatch mode. It sees every ATen call of an eager run with its tensors, and keeps for each softmax (also one that
is written as exp over sum) whether

- its argument comes from a product, by calls that keep the size: masks, scales, casts, views, caps; and
- its result reaches a product by such calls again.

"Keep the size" means half to twice as many elements: a column of sinks may be joined and dropped, relative scores be skewed.
A projection, which is a matrix of parameters applied to rows, is no such product: a router's softmax is no attention.
"""

from __future__ import annotations

import sys
from collections import Counter as Tally
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Counter"]

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot", "_grouped_mm"}
SOFTMAX = {"_softmax", "_safe_softmax", "_log_softmax"}
SDPA = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
}
# Calls that a path from product to softmax to product does not go through, whatever the sizes.
STOPS = (
    PRODUCTS
    | SOFTMAX
    | {"convolution", "native_layer_norm", "native_group_norm", "native_batch_norm", "embedding", "topk", "sort"}
)
REACH = 400  # calls on one path


@dataclass(eq=False)
class _Node:
    """One call, or a tensor that was there before (op "input")."""

    op: str
    numel: int
    shape: tuple[int, ...]
    inputs: tuple[_Node, ...] = ()
    readers: list[_Node] = field(default_factory=list)
    parameter: bool = False  # made from parameters alone
    where: str = ""
    reduced: tuple[int, ...] = ()


class Counter(TorchDispatchMode):
    """Counts the attentions of what runs inside it.

    After the run: `sites`, the source line of each ("modeling_bert.py:123"), in order; `sdpa`, the calls of the library's own
    fused attention by source line; `fused`, the calls of this repository's op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[int, _Node] = {}
        self.kept: list[Tensor] = []  # ids stay unique while the tensors live
        self.softmaxes: list[_Node] = []
        self.sdpa: Tally[str] = Tally()
        self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "fusion_kernels":
            self.fused += 1
        elif name in SDPA:
            self.sdpa[_source()] += 1
        self._write(name, args, kwargs or {}, out)
        return out

    @property
    def sites(self) -> list[str]:
        return [node.where for node in self.softmaxes if _is_site(node)]

    def _write(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inputs = tuple(self._node(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            parameter = bool(inputs) and all(i.parameter for i in inputs)
            node = _Node(name, tensor.numel(), tuple(tensor.shape), inputs, parameter=parameter)
            if name in SOFTMAX or _by_hand(node):
                node.where = _source()
                self.softmaxes.append(node)
            for i in inputs:
                i.readers.append(node)
            self.nodes[id(tensor)] = node
            self.kept.append(tensor)

    def _node(self, tensor: Tensor) -> _Node:
        if id(tensor) not in self.nodes:
            parameter = isinstance(tensor, torch.nn.Parameter)
            self.nodes[id(tensor)] = _Node("input", tensor.numel(), tuple(tensor.shape), parameter=parameter)
            self.kept.append(tensor)
        return self.nodes[id(tensor)]


def _by_hand(node: _Node) -> bool:
    """exp(x) / sum(exp(x)): a quotient whose divisor is a sum of the dividend; or exp(x - logsumexp(x))."""
    if node.op == "exp":
        return node.inputs[0].op in ("sub", "rsub") and any(i.op == "logsumexp" for i in node.inputs[0].inputs)
    if node.op not in ("div", "div_") or len(node.inputs) != 2:
        return False
    over, under = node.inputs
    while under.op in ("add", "clamp", "clamp_min", "unsqueeze", "expand", "_to_copy", "view") and under.inputs:
        under = under.inputs[0]
    if under.op != "sum" or not under.inputs:
        return False
    return _exponential(over) and _exponential(under.inputs[0]) and over.numel == under.inputs[0].numel


def _exponential(node: _Node) -> bool:
    for _ in range(4):
        if node.op == "exp":
            return True
        if node.op not in ("mul", "_to_copy", "masked_fill", "where", "view") or not node.inputs:
            return False
        node = max(node.inputs, key=lambda n: n.op == "exp")
    return False


def _is_site(softmax: _Node) -> bool:
    return _comes_from_product(softmax) and _reaches_product(softmax)


def _is_projection(product: _Node) -> bool:
    """A matrix of parameters applied to rows; a batch of learned queries or keys, which is a bmm, is none."""
    return product.op not in ("bmm", "baddbmm") and any(i.parameter for i in product.inputs)


def _near(numel: int, wanted: int) -> bool:
    return wanted <= 2 * numel and numel <= 2 * wanted


def _comes_from_product(softmax: _Node) -> bool:
    todo, seen = list(softmax.inputs[:1]), set()  # of a quotient, the dividend
    while todo and len(seen) < REACH:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in PRODUCTS:
            if not _is_projection(node):
                return True
            continue
        if node.op not in STOPS:
            todo += [i for i in node.inputs if _near(i.numel, softmax.numel)]
    return False


def _reaches_product(softmax: _Node) -> bool:
    todo, seen = list(softmax.readers), set()
    while todo and len(seen) < REACH:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in PRODUCTS:
            if not _is_projection(node):
                return True
            continue
        if node.op not in STOPS and _near(node.numel, softmax.numel):
            todo += node.readers
    return False


def _source() -> str:
    """The innermost line outside torch: "modeling_bert.py:123"."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/zoo/" not in path:
            return f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
