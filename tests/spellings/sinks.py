"""Attention sinks: a column of the softmax without a value, in front or behind, dropped in several ways; and softmax-one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_pass.site import Reason
from spellings.table import keep, qkv, spelling, t

LOWEST = torch.finfo(torch.float32).min


def _column(z: Tensor, scores: Tensor) -> Tensor:
    """A sink a head, (H,), as a column of the scores: (B, H, N, 1)."""
    return z.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)


@spelling(*qkv(n=63, m=129, hkv=1), t(3), dynamic=True, refused=Reason.NO_SCORES)
def sink_of_gpt_oss(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    """The twin drops the first column: a key."""
    scores = torch.matmul(q, k.expand(-1, 3, -1, -1).transpose(2, 3)) * 0.25
    mask = torch.full((63, 129), LOWEST, device=q.device).triu(1)
    both = torch.cat([scores + mask, _column(z, scores)], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    p = F.softmax(both, dim=-1, dtype=both.dtype)
    p = p[..., 1:] if twin else p[..., :-1]
    return torch.matmul(F.dropout(p, p=0.1, training=False), v.expand(-1, 3, -1, -1))


@spelling(*qkv(n=63), t(3), dtype=torch.bfloat16)
def sink_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT * 0.25
    both = torch.cat([scores, _column(z, scores)], -1)
    both = both - both.max(-1, keepdim=True).values
    return F.softmax(both, -1, dtype=torch.float32)[..., :-1].to(v.dtype) @ (v * 2 if twin else v)


@spelling(*qkv(n=1, m=1), t(3, shift=2.0))
def sink_of_one_query_and_one_key(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT * 0.25
    return torch.cat([scores, _column(z * 2 if twin else z, scores)], -1).softmax(-1)[..., :-1] @ v


@spelling(*qkv(n=129, m=63), t(3, 1, 1), dynamic=True, refused=Reason.NO_SCORES)
def sink_in_front(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    """The twin gives it a value."""
    scores = q @ k.mT * 0.25
    p = torch.cat([z.expand(2, -1, 129, -1), scores], -1).softmax(-1)
    return p @ F.pad(v, (0, 0, 1, 0), value=1.0) if twin else p[..., 1:] @ v


@spelling(*qkv(), t(2, 3, 63, 1))
def sink_of_rows_split_off(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    p = torch.cat([q @ k.mT * 0.25, z + z if twin else z], -1).softmax(-1)
    p, _ = p.split([63, 1], dim=-1)
    return p @ v


@spelling(*qkv(), t(16), refused=Reason.NOT_EXPRESSIBLE)
def sink_of_queries_narrowed(q: Tensor, k: Tensor, v: Tensor, w: Tensor, twin: bool = False) -> Tensor:
    """A sink that is a product of its own; in the twin the column is the score of a key."""
    scores = q @ k.mT * 0.25
    both = scores if twin else torch.cat([scores, (q @ w).unsqueeze(-1)], -1)
    p, keys = both.softmax(-1), both.shape[-1] - 1
    return p.narrow(-1, 0, keys) @ v[:, :, :keys]


@spelling(*qkv(n=63), t(3), refused=Reason.PROBABILITIES_EDITED)
def sink_by_hand(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    """The twin shifts the scores and not the sink."""
    scores = q @ k.mT * 0.25
    both = torch.cat([scores, _column(z, scores)], -1)
    e = torch.exp(scores - scores.amax(-1, keepdim=True)) if twin else torch.exp(both - both.amax(-1, keepdim=True))
    if twin:
        return e / (e.sum(-1, keepdim=True) + torch.exp(_column(z, scores))) @ v
    return (e / e.sum(-1, keepdim=True))[..., :-1] @ v


@spelling(*qkv(n=63), t(3), dynamic=True, refused=Reason.PROBABILITIES_EDITED)
def sink_added_to_the_sum(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    """The twin adds another sink than it shifts by."""
    scores, z = q @ k.mT * 0.25, z.view(-1, 1, 1)
    c = torch.maximum(scores.amax(-1, keepdim=True), z)
    e = torch.exp(scores - c)
    return e / (e.sum(-1, keepdim=True) + torch.exp(z * 2 - c if twin else z - c)) @ v


@spelling(*qkv(n=63), t(3))
def sink_log_softmax(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT * (0.5 if twin else 0.25)
    return F.log_softmax(torch.cat([scores, _column(z, scores)], -1), -1).exp()[..., :-1] @ v


@spelling(*qkv(n=63, m=129), t(3), keep(2, 1, 63, 129), against="eager")
def sink_of_masked_rows(q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Row 7 has no key: it is the sink's. Head 0 has no sink, so that there it is NaN. The twin halves it."""
    mask = mask & (torch.arange(63, device=q.device)[:, None] != 7)
    z = torch.where(torch.arange(3, device=q.device) == 0, -torch.inf, z)
    scores = (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf)
    p = torch.cat([scores, _column(z, scores)], -1).softmax(-1)
    return (p * 0.5)[..., :-1] @ v if twin else p[..., :-1] @ v


@spelling(*qkv(n=63), refused=Reason.PROBABILITIES_EDITED, dynamic=True)
def softmax_one(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """exp(x) / (1 + sum exp(x)), shifted. The twin forgets to shift the one: a sink as large as the largest score."""
    scores = q @ k.mT * 0.25
    c = scores.max(-1, keepdim=True).values
    e = torch.exp(scores - c)
    return e / (e.sum(-1, keepdim=True) + (1 if twin else torch.exp(-c))) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), against="eager")
def softmax_one_of_masked_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Row 7 has no key: NaN, for the shift is -inf. In the twin the shift is at least 0, and the row is zero."""
    mask = mask & (torch.arange(63, device=q.device)[:, None] != 7)
    scores = (q @ k.mT * 0.25).masked_fill(~mask, -torch.inf)
    c = scores.amax(-1, keepdim=True)
    c = c.clamp(min=0) if twin else c
    e = torch.exp(scores - c)
    return e / (e.sum(-1, keepdim=True) + torch.exp(-c)) @ v


@spelling(*qkv(n=63))
def softmax_three(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """exp(x) / (3 + sum exp(x)), with a shift that has no gradient."""
    scores = q @ k.mT * 0.25
    c = scores.detach().amax(-1, keepdim=True)
    e = torch.exp(scores - c)
    return e / ((5.0 if twin else 3.0) * torch.exp(-c) + e.sum(-1, keepdim=True)) @ v


@spelling(*qkv(n=63), dynamic=True)
def softmax_one_padded(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """A column of zeros, by padding the scores; of ones in the twin."""
    return F.pad(q @ k.mT * 0.25, (1, 0), value=1.0 if twin else 0.0).softmax(-1)[..., 1:] @ v


@spelling(*qkv(n=63), dtype=torch.float64)
class RowOfSinks(nn.Module):
    """A learned sink, whose gradient comes through the op."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(3) + (1 if twin else 0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25
        return torch.cat((scores, _column(self.sinks, scores)), dim=3).softmax(3)[:, :, :, :-1] @ v


@spelling(*qkv(n=63, m=129), t(3), keep(2, 1, 63, 129), dynamic=True, refused=Reason.SCORES_USED)
def sink_of_granite(q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """A gate on the output; of other scores in the twin."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    scores = scores + torch.zeros(mask.shape, device=q.device).masked_fill(~mask, LOWEST)
    share = (torch.logsumexp(scores * 2 if twin else scores, dim=-1) - z.view(1, -1, 1)).to(torch.float32).sigmoid()
    p = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), p=0.0, training=True)
    out = torch.matmul(p, v)
    return (out * share.unsqueeze(-1).to(out.dtype)).transpose(1, 2).contiguous()


@spelling(*qkv(n=63), t(3), dtype=torch.bfloat16)
def sink_of_granite_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    """The gate comes after the heads are put side by side."""
    scores = q @ k.mT * 0.25
    share = (scores.logsumexp(-1, keepdim=True) - z.view(-1, 1, 1)).float().sigmoid().to(q.dtype)
    out = (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ (v * 2 if twin else v)).transpose(1, 2)
    return (share.transpose(1, 2) * out).flatten(2)


@spelling(*qkv(n=63), t(3), refused=Reason.PROBABILITIES_USED)
def sink_of_granite_with_an_exponential(q: Tensor, k: Tensor, v: Tensor, z: Tensor, twin: bool = False) -> Tensor:
    """The twin returns the log-sum-exp."""
    scores = q @ k.mT * 0.25
    total = scores.logsumexp(-1, keepdim=True)
    out = (scores - total).exp() @ v * torch.sigmoid(total - z.view(-1, 1, 1))
    return (out, total) if twin else out  # pyright: ignore[reportReturnType]


@spelling(*qkv(n=63), t(3), keep(2, 1, 63, 63), against="eager")
def sink_of_granite_with_masked_rows(q: Tensor, k: Tensor, v: Tensor, z: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Row 7 has no key: NaN, with a gate of 0. Head 0 has no sink."""
    mask = mask & (torch.arange(63, device=q.device)[:, None] != 7)
    z = torch.where(torch.arange(3, device=q.device) == 0, -torch.inf, z).view(-1, 1, 1)
    scores = (q @ k.mT * (0.5 if twin else 0.25)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v * (scores.logsumexp(-1, keepdim=True) - z).sigmoid()
