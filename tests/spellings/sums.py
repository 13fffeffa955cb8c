"""Sums and differences of several softmaxes over the same values, as in differential attention (arXiv 2410.05258)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusion_pass.site import Reason
from spellings.table import keep, qkv, spelling, t


def _softmax(q: Tensor, k: Tensor, scale: float = 0.25) -> Tensor:
    return (q @ k.mT * scale).softmax(-1)


MAPS = (t(2, 3, 63, 16), t(2, 3, 129, 16), t(2, 3, 63, 16), t(2, 3, 129, 16), t(2, 3, 129, 32))


@spelling(*MAPS, t(3, 1, 1), sites=2, dynamic=True)
def differential(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, share: Tensor, twin: bool = False) -> Tensor:
    """A learned share for each head."""
    first, second = _softmax(q1, k1), _softmax(q2, k2)
    return (first + share * second if twin else first - share * second) @ v


@spelling(*MAPS, sites=2, dtype=torch.bfloat16)
def differential_in_bfloat16(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    p = _softmax(q1, k1).float() - (0.8 if twin else 0.3) * _softmax(q2, k2).float()
    return p.to(v.dtype) @ v


@spelling(t(2, 63, 48), sites=2)
class DifferentialHeads(nn.Module):
    """One softmax over twice the heads, whose maps are subtracted in pairs; the share is exp(a) - exp(b) + a constant."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, 48) for _ in range(3))
        self.a, self.b = (nn.Parameter(torch.randn(8) * 0.1) for _ in range(2))
        self.norm, self.start = nn.RMSNorm(16), 0.5 if twin else 0.8

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k = (f(x).view(-1, n, 6, 8).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).view(-1, n, 3, 16).transpose(1, 2)
        hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        p = (q @ k.mT * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1).view(-1, 3, 2, n, n)
        share = self.a.sum().exp() - self.b.sum().exp() + self.start
        out = self.norm((p[:, :, 0] - share * p[:, :, 1]) @ v)
        return out.transpose(1, 2).flatten(2)


@spelling(*qkv(n=63), sites=3)
def three_maps(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    p = _softmax(q, k) + 2 * _softmax(k, q) - _softmax(q, q)
    return (p if not twin else p + _softmax(q, q)) @ v


@spelling(*MAPS, keep(2, 1, 63, 129), sites=2)
def mask_on_the_sum(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    p = (_softmax(q1, k1) - 0.5 * _softmax(q2, k2)) / 2
    return (p if twin else p.masked_fill(~mask, 0.0)) @ v


@spelling(*qkv(n=63), t(2, 1, 63, 63))
def one_map_twice(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, twin: bool = False) -> Tensor:
    """One softmax in both terms is one attention."""
    p = _softmax(q, k)
    return (p - p * gate if twin else p + p * gate) @ v


@spelling(*qkv(n=63), sites=2, refused=Reason.PROBABILITIES_EDITED)
def no_guard_on_the_sum(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Whether a difference is NaN is no question to each of its terms."""
    p = _softmax(q, k) - 0.5 * _softmax(k, q)
    return (torch.where(torch.isnan(p), 0.0, p) if twin else p) @ v


@spelling(*qkv(n=63), t(2, 3, 63, 63), sites=2, refused=Reason.NO_SCORES)
def a_map_of_positions_alone(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    """A softmax of no product is no attention (ConViT's positions)."""
    return (_softmax(q, k) + (bias.softmax(-1) if twin else _softmax(k, q))) @ v


@spelling(*qkv(n=63), t(2, 3, 63, 1), t(2, 3, 1, 63), sites=2, refused=Reason.NO_SCORES)
def no_product_for_one_of_the_terms(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, twin: bool = False) -> Tensor:
    """A bias that is an outer product is no product of matrices in one term while another one has some."""
    first = (q @ k.mT * 0.25 + a * b).softmax(-1)
    return (first + ((a * b).softmax(-1) if twin else _softmax(k, q))) @ v
