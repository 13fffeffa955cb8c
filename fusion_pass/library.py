"""``scaled_dot_product_attention`` is a spelling like any other: it is read as the products and the softmax that it stands for.

torch chooses one of its kernels by the operands, and most of them are one opaque call.  On the tape stands what such a call is
documented to compute.  The user's graph is not changed by that: there the attention is replaced as a whole or not at all.

A bool mask is one to the user, whatever torch makes of it for a kernel: numbers, -inf for one and -65536 for another, aligned.

A call without a mask is left as it is: what torch runs for it is as fast as anything.  With a mask or a bias it takes slower
kernels, and reads a mask of N x M elements (one H200, `docs/benchmark.md`: the fastest of them took 1.35 to 53 times our time).
On a CPU it is one kernel that reads masks, and ours is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from .strides import memory_order
from .tape import Value

__all__ = ["arguments", "in_products", "is_kernel", "kind_of", "laid_out_as", "visible", "why_left"]

PLAIN, MASKED = "plain", "masked"
# Steps of whole models (one H200, docs/models.md), ours over torch's own kernels: 2.2 with 49 keys and a learned bias (Swin),
# 0.89 with 384 and such a bias (an Evoformer's rows), 0.98 with 512 and padding (BERT).
FEWEST_KEYS = 256


def is_kernel(func: Any) -> bool:
    """Whether an ATen op is one of the kernels that scaled_dot_product_attention chooses from."""
    name = func.overloadpacket.__name__
    return name.startswith("_scaled_dot_product_") and not ("_math" in name or name.endswith("_backward"))


def arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a kernel is called with, by the names of `in_products`."""
    given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    given["mask"] = given.get("attn_mask", given.get("attn_bias"))
    return {name: given[name] for name in ("query", "key", "value", "mask", "dropout_p", "is_causal", "scale") if name in given}


def visible(mask: Value | None) -> tuple[Value, bool] | None:
    """The bool tensor that torch made a mask of numbers from, inside of its call, and whether True is what is seen."""
    while mask is not None and mask.record is not None and mask.record.op in _ALIGNED and _in_one_call(mask, mask.record.args[0]):
        mask = mask.record.args[0]
    record = mask.record if mask is not None and mask.node is None else None
    if record is None or record.op not in _CHOSEN:
        return None
    chosen, *numbers = (record.args[i] for i in _CHOSEN[record.op])
    if sorted(map(_is_hidden, numbers), key=str) != [False, True]:
        return None  # whoever made it may have chosen between any numbers
    return chosen, bool(_is_hidden(numbers[1]))


_ALIGNED = frozenset({"expand.default", "constant_pad_nd.default", "slice.Tensor"})
# op -> positions of the condition, of what is chosen where it is True, and of the rest
_CHOSEN = {"where.self": (0, 1, 2), "masked_fill.Scalar": (1, 2, 0), "masked_fill.Tensor": (1, 2, 0)}
_NUMBERS = {"scalar_tensor.default": 0, "full.default": 1, "full_like.default": 1}  # op -> position of the number
_ZEROS = frozenset({"zeros.default", "zeros_like.default", "new_zeros.default"})
HIDDEN = -65504.0  # what is added to hide a key, at most


def _in_one_call(a: Value, b: Value) -> bool:
    return a.node is None and a.record is not None and b.record is not None and a.record.node is b.record.node


def _is_hidden(x: Any) -> bool | None:
    """Whether a number, or a tensor of one, hides a key that it is added to; None where it is neither such a number nor 0."""
    record = x.record if isinstance(x, Value) else None
    if record is not None:
        x = 0.0 if record.op in _ZEROS else record.args[_NUMBERS[record.op]] if record.op in _NUMBERS else None
    if not isinstance(x, (int, float)) or (x != 0 and not x <= HIDDEN):
        return None
    return x != 0


def kind_of(mask: Value | None) -> str:
    """What is noted of a call (`Record.library`).

    One with a mask that needs a gradient torch computes in products on a CPU: it chose a kernel here without knowing of that.
    """
    if mask is None:
        return PLAIN
    return "" if mask.differentiable and mask.tensor.device.type == "cpu" else MASKED


def why_left(kind: str, device: torch.device, keys: sympy.Expr) -> str | None:
    """Why a call that torch runs as one kernel is not replaced, or None where it is.

    Args:
        kind: `Record.library`.
        keys: how many there are.
    """
    if kind == PLAIN:
        return "torch has a kernel for scaled_dot_product_attention without a mask"
    if kind and device.type == "cpu":
        return "torch has a kernel for scaled_dot_product_attention on a CPU"
    if kind and keys.is_Integer and int(keys) < FEWEST_KEYS:
        return f"{keys} keys are too few to replace a kernel of torch"
    return None


def in_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What a kernel computes, (B, H, N, Dv); keys and values may have fewer heads, and a row without a key gives zeros."""
    if key.size(1) != query.size(1):
        group = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-2, -1) * (query.size(-1) ** -0.5 if scale is None else scale)
    if mask is not None and mask.dtype != torch.bool:
        scores = (scores + mask).to(scores.dtype)
    elif mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if is_causal:
        seen = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    p = torch.ops.aten._safe_softmax(scores, -1)
    return (torch.dropout(p, dropout_p, train=True) if dropout_p else p) @ value


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """`x` with its dims in memory as those of `like`, which has its shape: whether a later view may be taken depends on that."""
    order = memory_order(like)
    if order == memory_order(x):
        return x
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
