"""``scaled_dot_product_attention`` is a spelling like any other: it is read as the products and the softmax that it stands for.

torch chooses one of its kernels by the operands, and most of them are one opaque call.  On the tape stands what such a call is
documented to compute.  The user's graph is not changed by that: there the attention is replaced as a whole or not at all.

A call without a mask is left as it is: what torch runs for it is as fast as anything.  With a mask or a bias it takes slower
kernels, and reads a mask of N x M elements (one H200, `docs/benchmark.md`: the fastest of them took 1.35 to 53 times our time).
On a CPU it is one kernel that reads masks, and ours is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .strides import memory_order

__all__ = ["arguments", "in_products", "is_kernel", "kind_of", "laid_out_as", "why_left"]

PLAIN, MASKED = "plain", "masked"


def is_kernel(func: Any) -> bool:
    """Whether an ATen op is one of the kernels that scaled_dot_product_attention chooses from."""
    name = func.overloadpacket.__name__
    return name.startswith("_scaled_dot_product_") and not ("_math" in name or name.endswith("_backward"))


def arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a kernel is called with, by the names of `in_products`."""
    given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)
    given["mask"] = given.get("attn_mask", given.get("attn_bias"))
    return {name: given[name] for name in ("query", "key", "value", "mask", "dropout_p", "is_causal", "scale") if name in given}


def kind_of(mask: Tensor | None, learned: bool) -> str:
    """What is noted of a call (`Record.library`); learned: whether its mask may need a gradient.

    On a CPU torch computes such a call in products: the kernel was chosen without knowing of the gradient.
    """
    if mask is None:
        return PLAIN
    return "" if learned and mask.device.type == "cpu" else MASKED


def why_left(kind: str, device: torch.device) -> str | None:
    """Why a call that torch runs as one kernel is not replaced, or None where it is; kind: `Record.library`."""
    if kind == PLAIN:
        return "torch has a kernel for scaled_dot_product_attention without a mask"
    return "torch has a kernel for scaled_dot_product_attention on a CPU" if kind and device.type == "cpu" else None


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
    p = torch.softmax(scores, -1) if mask is None else torch.ops.aten._safe_softmax(scores, -1)
    return (torch.dropout(p, dropout_p, train=True) if dropout_p else p) @ value


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """`x` with its dims in memory as those of `like`, which has its shape: whether a later view may be taken depends on that."""
    order = memory_order(like)
    if order == memory_order(x):
        return x
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
