"""The two products: q with k, and the probabilities with v."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_pass.site import Reason
from spellings.table import qkv, spelling, t


@spelling(*qkv(n=63, m=129), dynamic=True)
def at_operator(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return ((q @ k.mT) * (0.5 if twin else 0.25)).softmax(-1) @ v


@spelling(*qkv(n=129, m=63, dv=24))
def matmul(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)) / (2 if twin else 4), dim=-1), v)


@spelling(t(6, 63, 16), t(6, 129, 16), t(6, 129, 8))
def bmm(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2)) * 0.25
    return torch.bmm((-scores if twin else scores).softmax(dim=-1), v)


@spelling(t(6, 63, 16), t(6, 63, 16), t(6, 63, 16), dynamic=True)
def baddbmm_empty(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.5 if twin else 0.25)
    return torch.bmm(scores.softmax(-1), v)


@spelling(t(6, 1, 129), t(6, 63, 16), t(6, 129, 16), t(6, 129, 16))
def baddbmm_bias(bias: Tensor, q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=1.0 if twin else 0.5, alpha=0.25)
    return scores.softmax(-1).bmm(v)


@spelling(t(6, 63, 129), t(6, 63, 16), t(6, 129, 16), t(6, 129, 16))
def baddbmm_method(bias: Tensor, q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = bias.baddbmm(q, k.transpose(-1, -2), alpha=1.0 if twin else 0.25)
    return scores.softmax(-1).bmm(v)


@spelling(*qkv(n=63, m=129))
def einsum_bhnd(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    return torch.einsum("bhqk,bhkd->bhqd", (scores if twin else scores * 0.25).softmax(-1), v)


@spelling(t(2, 63, 3, 16), t(2, 129, 3, 16), t(2, 129, 3, 16))
def einsum_bnhd(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * (0.5 if twin else 0.25)).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v)


@spelling(t(6, 63, 16), t(6, 63, 16), t(6, 63, 16))
def einsum_3d_odd_letters(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = torch.einsum("zoy,zky->zko" if twin else "zky,zoy->zko", q, k)
    return torch.einsum("zko,zoy->zky", torch.softmax(scores * 0.25, 2), v)


@spelling(t(2, 63, 3, 16), t(2, 129, 3, 16), t(2, 129, 3, 16), dynamic=True)
def einsum_heads_last(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Scores as (batch, query, key, head): the softmax dim is -2."""
    p = torch.einsum("bqhd,bkhd->bqkh", q, k).mul(0.5 if twin else 0.25).softmax(-2)
    return torch.einsum("bqkh,bkhd->bqhd", p, v)


@spelling(*qkv(n=63, m=63), refused=Reason.SOFTMAX_DIM)
def keys_first(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Scores as (key, query), probabilities transposed back; the twin takes the softmax over the queries."""
    p = ((k @ q.mT) * 0.25).softmax(-1 if twin else -2)
    return p.mT @ v


@spelling(*qkv(n=63, m=129))
def scores_transposed_back(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = torch.matmul(k, q.transpose(2, 3)).transpose(2, 3)
    return ((scores * 2 if twin else scores) * 0.25).softmax(-1) @ v


@spelling(*qkv(n=63, m=129))
def values_on_the_left(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    p = ((q @ k.mT) * (0.5 if twin else 0.25)).softmax(-1)
    return (v.mT @ p.mT).mT


@spelling(t(2, 2, 3, 63, 16), t(2, 2, 129, 16), t(2, 2, 129, 16), dynamic=True)
def einsum_grouped(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """(batch, kv head, group, query, d) against (batch, kv head, key, d)."""
    p = torch.einsum("bhgqd,bhkd->bhgqk", q * (0.5 if twin else 0.25), k).softmax(-1)
    return torch.einsum("bhgqk,bhkd->bhgqd", p, v)


@spelling(*qkv(n=63, m=129))
def einsum_ellipsis(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    p = torch.softmax(torch.einsum("...qd,...kd->...qk", q, k) / (8.0 if twin else 4.0), -1)
    return torch.einsum("...qk,...kd->...qd", p, v)


@spelling(t(2, 63, 3, 16), t(2, 129, 16), t(2, 129, 16))
def einsum_multi_query(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """One kv head, never expanded in the code."""
    p = (torch.einsum("bqhd,bkd->bhqk", q, k) * (0.5 if twin else 0.25)).softmax(-1)
    return torch.einsum("bhqk,bkd->bqhd", p, v)


@spelling(*qkv(n=63, m=129, hkv=1), dynamic=True)
def broadcast_kv(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """matmul itself broadcasts the single kv head."""
    return ((q @ k.transpose(-1, -2)) * (1.0 if twin else 0.25)).softmax(-1) @ v


@spelling(t(2, 3, 63, 16), t(129, 16), t(129, 16))
def shared_memory(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Keys and values without batch or heads: matmul folds q."""
    return ((q @ k.t()) * (1.0 if twin else 0.25)).softmax(-1) @ v


@spelling(t(63, 16), t(129, 16), t(129, 16))
def two_dims(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return torch.mm(torch.softmax(torch.mm(q, k.t()) * (1.0 if twin else 0.25), 1), v)


@spelling(*qkv(n=1, m=197), dynamic=True)
def one_query(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return ((q @ k.mT) * (0.5 if twin else 0.25)).softmax(-1) @ v


@spelling(*qkv(n=63, m=1))
def one_key(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return ((q @ k.mT) * 0.25).softmax(-1) @ (-v if twin else v)


@spelling(*qkv(b=1, h=1, n=197, m=197, d=1))
def head_dim_one(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * (0.5 if twin else 1.0)).softmax(-1) @ v


@spelling(*qkv(b=1, n=63, m=129, d=72, dv=40))
def head_dim_72(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * (72**-0.5 * (0.5 if twin else 1.0))).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), dtype=torch.bfloat16)
def matmul_bf16(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return ((q @ k.mT) * (1.0 if twin else 0.25)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), dtype=torch.float16)
def matmul_fp16(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return ((q @ k.mT) * (1.0 if twin else 0.25)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), dtype=torch.float64)
def matmul_fp64(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return ((q @ k.mT) * (1.0 if twin else 0.25)).softmax(-1) @ v


@spelling(t(2, 63, 3, 1), t(2, 129, 3, 1), t(2, 129, 3, 8), refused=Reason.NO_SCORES)
def einsum_head_dim_one(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """A sum over one element: einsum multiplies. The twin's factors are both of the keys."""
    scores = torch.einsum("bmhd,bmhd->bhm", k, k)[:, :, None] if twin else torch.einsum("bnhd,bmhd->bhnm", q, k)
    p = (scores.expand(2, 3, 63, 129) * 0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", p, v)


@spelling(t(2, 63, 3, 1), t(2, 129, 3, 1), t(2, 129, 3, 8), t(63, 1), t(129), dtype=torch.bfloat16)
def einsum_head_dim_one_bf16(q: Tensor, k: Tensor, v: Tensor, r: Tensor, c: Tensor, twin: bool = False) -> Tensor:
    """Each step is rounded, and what is added is a product of the same form."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.5 + (-r if twin else r) * c
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhnm,bmhd->bnhd", e / e.sum(-1, keepdim=True), v)


@spelling(t(2, 63), t(2, 129), t(2, 129, 5))
def outer_product(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return (q[:, :, None] * k[:, None] * (0.25 if twin else 0.5)).softmax(-1) @ v
