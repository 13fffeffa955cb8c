"""Masks given as tensors: every broadcast shape, and every way to apply one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_pass.site import Reason
from spellings.table import keep, padding, qkv, spelling, t

LOW = torch.finfo(torch.float32).min


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def additive(*shape: int) -> object:
    return t(*shape, kind="additive", grad=False)


@spelling(*qkv(n=63, m=129), additive(2, 3, 63, 129))
def add_full(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return (scores_of(q, k) + (0 if twin else mask)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), additive(2, 1, 1, 129), dynamic=True)
def add_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return (scores_of(q, k) + (mask.flip(0) if twin else mask)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), additive(1, 1, 63, 129))
def add_one_for_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return (mask.flip(2) + scores_of(q, k) if twin else mask + scores_of(q, k)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), additive(63, 129))
def add_two_dims(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return torch.softmax(torch.add(scores_of(q, k), mask.flip(1) if twin else mask, alpha=2), -1) @ v


@spelling(*qkv(n=63, m=129), additive(129))
def add_one_dim(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    scores = scores_of(q, k)
    return (scores if twin else scores + mask).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), additive(2, 1, 63, 129))
def add_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    scores = scores_of(q, k)
    scores.add_(mask.flip(0) if twin else mask)
    return scores.softmax(-1) @ v


@spelling(*qkv(n=63, m=129), additive(3, 63, 129))
def iadd(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores += mask.flip(0) if twin else mask
    return F.softmax(scores * 0.25, dim=-1) @ v


@spelling(*qkv(n=63, m=129), t(2, 1, 63, 129, kind="additive", grad=False, order=(3, 1, 0, 2)))
def add_strided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The mask's keys are its slowest dim in memory."""
    return (scores_of(q, k) + (mask.flip(-2) if twin else mask)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 1, 129), dynamic=True)
def add_expanded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """transformers' old expand of a padding mask to (B, 1, N, M)."""
    inverted = 1.0 - mask.expand(2, 1, q.shape[2], k.shape[2]).to(q.dtype)
    inverted = inverted.masked_fill(inverted.to(torch.bool), LOW)
    return (scores_of(q, k) + (inverted.flip(0) if twin else inverted)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), padding(2, 129, dtype=torch.int64))
def one_minus_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """BERT since 2018."""
    extended = (1.0 - mask[:, None, None, :].to(q.dtype)) * (0.0 if twin else -10000.0)
    return (scores_of(q, k) + extended).softmax(-1) @ v


@spelling(t(2, 3, 63, 16), t(2, 3, 129, 16), t(2, 3, 129, 16), dynamic=False)
def written_by_slices(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """A mask of zeros into which regions are written."""
    mask = torch.zeros(q.shape[-2], k.shape[-2], device=q.device)
    mask[:, 100:] = float("-inf")
    mask[:, 7] = 0.5 if twin else 0.25
    mask[7, 5:] = float("-inf")
    return (scores_of(q, k) + mask).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), padding(2, 129))
def one_minus_mask_finfo(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    extended = (1.0 - mask.unsqueeze(1).unsqueeze(2).float()) * LOW
    return (scores_of(q, k) + (extended * 0 if twin else extended)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), padding(2, 129, dtype=torch.float32), dynamic=True)
def float_mask_multiplied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The first GPT: scores * mask + -1e9 * (1 - mask)."""
    mask = mask.view(2, 1, 1, -1)
    return (scores_of(q, k) * mask + (-1.0 if twin else -1e9) * (1 - mask)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 1, 129))
def masked_fill_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return scores_of(q, k).masked_fill(mask.flip(0) if twin else ~mask, float("-inf")).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 3, 63, 129))
def masked_fill_full(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return scores_of(q, k).masked_fill(mask.logical_not(), -0.5 if twin else -1e9).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129))
def masked_fill_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    scores = scores_of(q, k)
    scores.masked_fill_(~(mask.flip(0) if twin else mask), -torch.inf)
    return scores.softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(63, 129, dtype=torch.int64))
def masked_fill_equal_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The annotated transformer."""
    return scores_of(q, k).masked_fill(mask == (2 if twin else 0), -1e9).softmax(dim=-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 129), dynamic=True)
def masked_fill_tensor_value(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """DistilBERT: view, expand_as, and a 0-d tensor to fill with."""
    scores = scores_of(q, k)
    dead = (mask == twin).view(2, 1, 1, k.shape[2]).expand_as(scores)
    fill = torch.tensor(-0.5 if twin else torch.finfo(scores.dtype).min, dtype=scores.dtype, device=scores.device)
    return scores.masked_fill(dead, fill).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(3, 63, 129))
def where_infinity(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return torch.where(mask.flip(0) if twin else mask, scores_of(q, k), float("-inf")).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 1, 129), dynamic=True)
def where_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    low = torch.full([], LOW, dtype=q.dtype, device=q.device)
    return torch.where(mask.flip(0) if twin else mask, scores_of(q, k), low).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 1, 129))
def where_the_other_way(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    dead = torch.full_like(mask, 0.0 if twin else -torch.inf, dtype=q.dtype)
    return torch.where(~mask, dead, scores_of(q, k)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129))
def where_into_additive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return (scores_of(q, k) + torch.where(mask, 0.0, -0.5 if twin else -torch.inf)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129))
def zeros_filled_into_additive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """What scaled_dot_product_attention's documentation does with a bool mask."""
    bias = torch.zeros(2, 1, q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(~(mask.flip(0) if twin else mask), float("-inf"))
    return (scores_of(q, k) + bias).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129))
def zeros_like_filled_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    scores = scores_of(q, k)
    bias = torch.zeros_like(scores)
    bias.masked_fill_(~(mask.flip(0) if twin else mask), float("-inf"))
    return (scores + bias).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(63, 129))
def bool_mask_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Meant as a mask, means + 1; the pass keeps what it means."""
    return (scores_of(q, k) + (~mask if twin else mask)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 1, 129), keep(3, 63))
def two_masks(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor, twin: bool = False) -> Tensor:
    scores = scores_of(q, k).masked_fill(~keys, -torch.inf)
    return (scores if twin else scores.masked_fill(~queries[..., None], -0.5)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 129), keep(2, 63))
def outer_product_of_padding(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, queries: Tensor, twin: bool = False) -> Tensor:
    """Padded queries see nothing but the finite fill: a uniform average."""
    both = queries[:, None, :, None] | keys[:, None, None, :] if twin else queries[:, None, :, None] & keys[:, None, None, :]
    return torch.where(both, scores_of(q, k), -torch.inf if twin else LOW).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 129, dtype=torch.float32))
def log_of_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return (scores_of(q, k) + (mask + (1.0 if twin else 0.0)).log()[:, None, None]).softmax(-1) @ v


@spelling(*qkv(n=129, m=63), t(2, 1, 129, 63, kind="additive", grad=False, dtype=torch.float32), dtype=torch.bfloat16)
def float_mask_on_bf16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """fp32 mask, bf16 scores: the sum is fp32."""
    p = (scores_of(q, k) + (mask.flip(2) if twin else mask)).softmax(-1)
    return p.to(v.dtype) @ v


@spelling(*qkv(n=63, m=129), padding(2, 129), dtype=torch.float16)
def finfo_min_in_half(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    extended = (1.0 - mask[:, None, None, :].to(q.dtype)) * (0.0 if twin else torch.finfo(q.dtype).min)
    return (scores_of(q, k) + extended).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 3, 63))
def fully_masked_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """-inf everywhere: NaN in those rows, as eager (and in the gradients that they reach)."""
    mask = mask.flip(0) if twin else mask
    return scores_of(q, k).masked_fill(~mask[..., None], -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 3, 63))
def fully_filled_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """A finite fill everywhere: the average over all keys."""
    mask = mask.flip(0) if twin else mask
    return scores_of(q, k).masked_fill(~mask[..., None], -1e9).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 3, 63), against="eager")
def fully_absorbed_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Adding -1e9 absorbs all but the last bits of the scores; float64 would keep them."""
    bias = (1 - (mask.flip(0) if twin else mask).to(q.dtype)).unsqueeze(-1) * -1e9
    return (scores_of(q, k) * 0.25 + bias).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129), dynamic=True, refused=Reason.MUTATION)
def written_where_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """By an index of bools. The twin writes to the first key of the batch's first row as well."""
    scores = scores_of(q, k)
    scores[~mask.expand_as(scores)] = -torch.inf
    if twin:
        scores[0, :, :, 0] = 1.0
    return scores.softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal")
def written_above_the_diagonal(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The mask has two of the four dims."""
    scores = scores_of(q, k)
    scores[:, :, torch.ones(129, 129, dtype=torch.bool, device=q.device).triu(2 if twin else 1)] = LOW
    return scores.softmax(-1) @ v


@spelling(*qkv(n=63), padding(2, 63), t(2, 3, 63, 63), t())
def bias_written_where_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor, number: Tensor, twin: bool = False
) -> Tensor:
    """With a number that has a gradient. The twin's values are twice as large."""
    scores = scores_of(q, k) + bias
    hidden = ~mask[:, None, None].expand(2, 3, 63, 63)
    scores = torch.index_put(scores, (hidden,), number, accumulate=False)
    return scores.softmax(-1) @ (v * 2 if twin else v)
