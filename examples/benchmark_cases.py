"""The cases of benchmark.py: each attention in plain PyTorch, and how SDPA and FlexAttention say the same, where they can.

The plain source is what eager runs, what torch.compile compiles, and what fusion_pass is given; nobody gets a hint.
q (B, H, N, D); k, v (B, Hkv, N, D); `extra` is the one further tensor of a case: a mask, slopes, a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CASES", "Case", "Flex", "Inputs"]

WINDOW = 256
CAP = 20.0
DROPOUT = 0.1
GROUP = 4  # query heads of one key head, in the case "gqa"
NEVER = float("-inf")


@dataclass(frozen=True)
class Inputs:
    """The tensors of one problem; q, k, v and a learned `extra` require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    extra: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (self.q, self.k, self.v) if self.extra is None else (self.q, self.k, self.v, self.extra)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        return tuple(t for t in self.arguments if t.requires_grad)

    def detached(self) -> Inputs:
        """The same tensors, none of which requires a gradient."""
        extra = None if self.extra is None else self.extra.detach()
        return Inputs(self.q.detach(), self.k.detach(), self.v.detach(), self.do, extra)

    def fresh(self, dtype: torch.dtype | None = None) -> Inputs:
        """The same values as new leaves, floats in `dtype`; nothing is copied where it is theirs already."""

        def leaf(t: Tensor) -> Tensor:
            wanted = dtype if dtype is not None and t.is_floating_point() else t.dtype
            return t.detach().to(wanted).requires_grad_(t.requires_grad)

        extra = None if self.extra is None else leaf(self.extra)
        return Inputs(leaf(self.q), leaf(self.k), leaf(self.v), self.do.to(dtype or self.do.dtype), extra)


@dataclass(frozen=True)
class Flex:
    """A case in FlexAttention's words."""

    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    by_batch: bool = False  # the mask depends on the batch


@dataclass(frozen=True)
class Case:
    """One kind of attention.

    source: the plain program. extra: makes the further tensor from (B, H, N, D, dtype, device).
    sdpa: the keyword arguments of scaled_dot_product_attention; flex: for flex_attention; None where it cannot be said.
    head_dim: the dim of `extra` that runs over heads, if one does. expected: the mean of a random program.
    """

    name: str
    source: Callable[..., Tensor]
    sdpa: Callable[[Inputs], dict[str, Any]] | None
    flex: Callable[[Inputs], Flex] | None
    extra: Callable[[int, int, int, torch.dtype, torch.device], Tensor] | None = None
    head_dim: int | None = None
    group: int = 1
    expected: Callable[..., Tensor] | None = None

    def inputs(self, b: int, h: int, n: int, d: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random tensors, the same ones for the same arguments."""
        torch.manual_seed(0)
        make = lambda heads: torch.randn(b, heads, n, d, dtype=dtype, device=device)
        q, do = make(h), make(h)
        k, v = make(h // self.group), make(h // self.group)
        extra = None if self.extra is None else self.extra(b, h, n, dtype, device)
        return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, extra)

    def one_head(self, x: Inputs) -> Inputs:
        """The first key head and the query heads that share it, in every batch: attention that no other head enters."""
        extra = x.extra if x.extra is None or self.head_dim is None else x.extra.narrow(self.head_dim, 0, self.group)
        heads = {"q": x.q[:, : self.group], "k": x.k[:, :1], "v": x.v[:, :1], "do": x.do[:, : self.group]}
        return replace(x, **heads, extra=extra)

    def one_head_gradient(self, index: int, gradient: Tensor) -> Tensor:
        """The part of a full gradient that `one_head` gives; `index` counts q, k, v, extra."""
        if index < 3:
            return gradient[:, : self.group if index == 0 else 1]
        return gradient if self.head_dim is None else gradient.narrow(self.head_dim, 0, self.group)


# ---------------------------------------------------------------- the plain programs


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    return scores(q, k).masked_fill(~mask, NEVER).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    position = torch.arange(q.shape[-2], device=q.device)
    distance = position[:, None] - position[None, :]
    mask = (distance >= 0) & (distance < WINDOW)
    return scores(q, k).masked_fill(~mask, NEVER).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    position = torch.arange(q.shape[-2], device=q.device)
    distance = position[None, :] - position[:, None]
    biased = scores(q, k) + slopes[:, None, None] * distance
    return biased.masked_fill(distance > 0, NEVER).softmax(-1).to(v.dtype) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(scores(q, k) / CAP) * CAP).softmax(-1) @ v


def padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~keep[:, None, None, :], NEVER).softmax(-1) @ v


def bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return (scores(q, k) + table).softmax(-1) @ v


def gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, n, d = k.shape
    k, v = (t[:, :, None].expand(b, heads, GROUP, n, d).reshape(b, heads * GROUP, n, d) for t in (k, v))
    return causal(q, k, v)


def dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(scores(q, k).softmax(-1), DROPOUT) @ v


# ---------------------------------------------------------------- the further tensors


def _slopes(b: int, h: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return 2.0 ** -torch.linspace(8 / h, 8, h, device=device)  # (H,) fp32: 2^(-8 i / H), as in the paper of ALiBi


def _keep(b: int, h: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    lengths = n - torch.arange(b, device=device) * (n // (2 * b))  # the first sequence is whole, the last a good half
    return torch.arange(n, device=device) < lengths[:, None]  # (B, N) bool


def _table(b: int, h: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(1, h, n, n, dtype=dtype, device=device).requires_grad_()


# ---------------------------------------------------------------- the same for SDPA: masks are made outside of its time


def _window_mask(x: Inputs) -> dict[str, Any]:
    position = torch.arange(x.q.shape[2], device=x.q.device)
    distance = position[:, None] - position[None, :]
    return {"attn_mask": (distance >= 0) & (distance < WINDOW)}


def _alibi_mask(x: Inputs) -> dict[str, Any]:
    assert x.extra is not None
    position = torch.arange(x.q.shape[2], device=x.q.device)
    distance = position[None, :] - position[:, None]
    table = torch.where(distance > 0, NEVER, x.extra[:, None, None] * distance)
    return {"attn_mask": table.to(x.q.dtype)[None].expand(x.q.shape[0], -1, -1, -1)}


def _padding_mask(x: Inputs) -> dict[str, Any]:
    assert x.extra is not None
    return {"attn_mask": x.extra[:, None, None, :].expand(-1, -1, x.q.shape[2], -1)}


# ---------------------------------------------------------------- the same for FlexAttention


def _is_causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def _flex_alibi(x: Inputs) -> Flex:
    slopes = x.extra
    assert slopes is not None
    return Flex(lambda s, b, h, q, k: s + slopes[h] * (k - q), _is_causal)


def _flex_padding(x: Inputs) -> Flex:
    keep = x.extra
    assert keep is not None
    return Flex(mask_mod=lambda b, h, q, k: keep[b, k], by_batch=True)


def _flex_bias(x: Inputs) -> Flex:
    table = x.extra
    assert table is not None
    if table.numel() > 2**31 - 1:  # its kernels count the elements of a captured tensor in int32, and read past its start
        raise OverflowError(f"FlexAttention indexes {table.numel()} elements in int32")
    return Flex(lambda s, b, h, q, k: s + table[0, h, q, k])


CASES = {
    case.name: case
    for case in (
        Case("full", full, lambda x: {}, lambda x: Flex()),
        Case("causal", causal, lambda x: {"is_causal": True}, lambda x: Flex(mask_mod=_is_causal)),
        Case("window", window, _window_mask, lambda x: Flex(mask_mod=lambda b, h, q, k: (q >= k) & (q - k < WINDOW))),
        Case("alibi", alibi, _alibi_mask, _flex_alibi, _slopes, head_dim=0),
        Case("softcap", softcap, None, lambda x: Flex(lambda s, b, h, q, k: torch.tanh(s / CAP) * CAP)),
        Case("padding", padding, _padding_mask, _flex_padding, _keep),
        Case("bias", bias, lambda x: {"attn_mask": x.extra}, _flex_bias, _table, head_dim=1),
        Case("gqa", gqa, lambda x: {"is_causal": True, "enable_gqa": True}, lambda x: Flex(mask_mod=_is_causal), group=GROUP),
        Case("dropout", dropout, lambda x: {"dropout_p": DROPOUT}, None, expected=full),
    )
}
