"""Calls of torch's own attention: the same as written out, masks, biases and grouped heads included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_pass.site import Reason
from spellings.table import keep, qkv, spelling, t

sdpa = F.scaled_dot_product_attention


@spelling(*qkv(n=63, m=129), dynamic=True)
def sdpa_plain(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return sdpa(q, k, v, scale=0.5 if twin else None)


@spelling(*qkv(n=129), mask="causal")
def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return sdpa(q, k, v, is_causal=not twin)


@spelling(*qkv(n=63, m=129), mask="causal")
def sdpa_causal_of_two_lengths(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Counted from the first key; its twin from the last."""
    if twin:
        return sdpa(q, k, v, torch.ones(63, 129, dtype=torch.bool, device=q.device).tril(66))
    return sdpa(q, k, v, is_causal=True)


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129))
def sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask.flip(0) if twin else mask)


@spelling(*qkv(n=63, m=129), keep(2, 1, 1, 129), mask="padding", dynamic=True)
def sdpa_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return sdpa(q, k, v, mask.flip(0) if twin else mask)


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129))
def sdpa_rows_without_a_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Such a row gives zeros; its twin spells the same mask with a softmax, which gives NaN."""
    mask = mask & (torch.arange(63, device=q.device) != 5)[:, None]
    if not twin:
        return sdpa(q, k, v, mask)
    return (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), t(3, 63, 129))
def sdpa_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    return sdpa(q, k, v, attn_mask=bias.flip(0) if twin else bias)


@spelling(*qkv(n=63, m=129, d=20), keep(63, 129))
def sdpa_of_a_padded_head_dim(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Kernels that want a multiple of 8 are given zeros to fill it; the scale is that of 20."""
    return sdpa(q, k, v, mask, scale=24**-0.5 if twin else None)


@spelling(*qkv(n=63, h=6, hkv=2), keep(63, 63))
def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    if twin:
        k, v = (x.repeat(1, 3, 1, 1) for x in (k, v))
    return sdpa(q, k, v, mask, enable_gqa=not twin)


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129))
def sdpa_under_autocast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    with torch.autocast("cuda" if q.is_cuda else "cpu", torch.bfloat16):
        return sdpa(q, k, v, mask, scale=1.0 if twin else None)


@spelling(*qkv(n=63, m=129), t(2, 1, 63, 129))
def sdpa_bias_under_autocast(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    """A bias is cast with the rest."""
    with torch.autocast("cuda" if q.is_cuda else "cpu", torch.bfloat16):
        return sdpa(q, k, v, bias * 2 if twin else bias)


@spelling(t(63, 2, 48), keep(63, 63), refused=Reason.PROBABILITIES_USED)
class MultiheadWithMask(nn.Module):
    """torch's own layer calls it where the weights are not asked for; the twin asks for them."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.layer, self.twin = nn.MultiheadAttention(48, 3), twin

    def forward(self, x: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, weights = self.layer(x, x, x, attn_mask=~mask, need_weights=self.twin)
        return (out, weights) if self.twin else out
