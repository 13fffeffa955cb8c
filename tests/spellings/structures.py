"""Masks made in the graph from positions, and score functions: what the description must prove, not load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spellings.table import keep, padding, qkv, spelling, t


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * 0.25


def rows_and_columns(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=q.device)[None, :]


@spelling(*qkv(n=129), mask="causal")
def causal_tril(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    allowed = torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device), diagonal=-1 if twin else 0)
    return scores_of(q, k).masked_fill(~allowed, -1e9).softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal", dynamic=False)
def causal_triu_additive(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    bias = torch.triu(torch.full((q.shape[2], q.shape[2]), float("-inf"), device=q.device), diagonal=2 if twin else 1)
    return (scores_of(q, k) + bias).softmax(-1) @ v


@spelling(*qkv(n=197), mask="causal", dynamic=False)
def causal_full_triu_in_place(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    bias = torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=q.dtype, device=q.device).triu_(2 if twin else 1)
    return (scores_of(q, k) + bias).softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal", dynamic=False)
def causal_triu_bool(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    dead = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).triu(2 if twin else 1)
    return scores_of(q, k).masked_fill(dead, float("-inf")).softmax(-1) @ v


@spelling(*qkv(n=63, m=197), mask="causal")
def causal_arange_with_past(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The last n of m positions ask."""
    rows, columns = rows_and_columns(q, k)
    past = k.shape[2] - q.shape[2] - (1 if twin else 0)
    return torch.where(columns <= rows + past, scores_of(q, k), -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal")
def causal_arange_four_dims(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    i = torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1)
    j = torch.arange(k.shape[2], device=k.device).view(1, 1, 1, -1)
    return scores_of(q, k).masked_fill(j - i > (1 if twin else 0), -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal")
def causal_one_minus_tril(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The first GPT: multiply and subtract."""
    b = torch.tril(torch.ones(q.shape[2], k.shape[2], device=q.device), diagonal=1 if twin else 0)
    b = b.view(1, 1, q.shape[2], k.shape[2])
    return (scores_of(q, k) * b + -1e4 * (1 - b)).softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal", dynamic=False)
def causal_eager_where_triple(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(diagonal=1 if twin else 0)
    bias = torch.zeros(q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
    bias.masked_fill_(allowed.logical_not(), float("-inf"))
    return torch.softmax(scores_of(q, k) + bias, dim=-1) @ v


class Causal(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer(
            "bias", torch.tril(torch.ones(size, size, dtype=torch.bool)).view(1, 1, size, size), persistent=False
        )


@spelling(*qkv(n=129))
class CausalBuffer(Causal):
    """GPT-2: a slice of a registered buffer. Its values are not in the graph: loaded, not proved."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__(256)
        self.shift = 1 if twin else 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = q.size(-2), k.size(-2)
        mask = self.bias[:, :, m - n + self.shift : m + self.shift, :m]
        low = torch.full([], torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
        return torch.where(mask, scores_of(q, k), low).softmax(-1) @ v


@spelling(*qkv(n=63, m=129))
class CausalBufferNanoGPT(Causal):
    def __init__(self, twin: bool = False) -> None:
        super().__init__(256)
        self.twin = twin

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = k.size(-2) - q.size(-2)
        mask = (
            self.bias[:, :, : q.size(-2), : k.size(-2)] if self.twin else self.bias[:, :, past : past + q.size(-2), : k.size(-2)]
        )
        return scores_of(q, k).masked_fill(mask == 0, float("-inf")).softmax(-1) @ v


@spelling(*qkv(n=129), padding(2, 129), mask="causal")
def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    allowed = (columns <= rows) & (keep.flip(0) if twin else keep)[:, None, None, :]
    return scores_of(q, k).masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling(*qkv(n=129), padding(2, 129, dtype=torch.float32), mask="causal")
def causal_plus_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, twin: bool = False) -> Tensor:
    """Two additive masks, one after the other."""
    causal = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
    scores = scores_of(q, k) + causal
    return (scores if twin else scores + (1.0 - keep[:, None, None]) * -1e9).softmax(-1) @ v


@spelling(*qkv(n=197), mask="")
def sliding_window(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    allowed = (columns <= rows) & (rows - columns < (31 if twin else 32))
    return torch.where(allowed, scores_of(q, k), -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=197), mask="", dynamic=False)
def window_by_triu_and_tril(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    allowed = ones.tril(0) & ones.triu(-31 if twin else -32)
    return scores_of(q, k).masked_fill(~allowed, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=197), mask="", dynamic=False)
def window_both_ways(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    dead = torch.logical_or((rows - columns) > (10 if twin else 9), (columns - rows) > 9)
    return scores_of(q, k).masked_fill(dead, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=197))
def window_by_distance(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    return scores_of(q, k).masked_fill((rows - columns).abs() > (10 if twin else 9), -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129))
def prefix_lm(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    allowed = (columns <= rows) | (columns < (20 if twin else 40))
    return scores_of(q, k).masked_fill(~allowed, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129))
def block_diagonal(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    size = 31 if twin else 32
    return torch.where(rows // size == columns // size, scores_of(q, k), -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129), t(2, 129, kind="ids", grad=False))
def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, twin: bool = False) -> Tensor:
    same = ids[:, None, :, None] == ids[:, None, None, :]
    rows, columns = rows_and_columns(q, k)
    allowed = same if twin else same & (columns <= rows)
    return scores_of(q, k).masked_fill(~allowed, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129), padding(2, 129, dtype=torch.int64))
def lengths_compared(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, twin: bool = False) -> Tensor:
    """Lengths computed in the graph, compared with positions."""
    lengths = keep.sum(-1)
    columns = torch.arange(k.shape[2], device=k.device)
    allowed = columns < lengths[:, None] if not twin else columns <= lengths[:, None]
    return scores_of(q, k).masked_fill(~allowed[:, None, None, :], -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129), dynamic=False)
def strided_pattern(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    return scores_of(q, k).masked_fill((rows - columns) % (3 if twin else 4) != 0, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal")
def alibi_from_positions(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, q.shape[1] + 1, dtype=q.dtype, device=q.device)
    rows, columns = rows_and_columns(q, k)
    bias = slopes[:, None, None] * (columns - rows)
    scores = scores_of(q, k) + (bias * 0.5 if twin else bias)
    return scores.masked_fill(columns > rows, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=129), t(3, grad=False))
def alibi_slopes_given(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, twin: bool = False) -> Tensor:
    """Bloom: slopes times key position, shaped (heads, 1, M)."""
    bias = slopes[:, None] * torch.arange(k.shape[2], dtype=q.dtype, device=q.device)[None, :] / 64
    return (scores_of(q, k) + (bias.flip(0) if twin else bias)[:, None, :]).softmax(-1) @ v


@spelling(*qkv(n=129), t(32, 3))
def relative_positions(q: Tensor, k: Tensor, v: Tensor, table: Tensor, twin: bool = False) -> Tensor:
    """T5: an embedding of a clamped distance; its gradient goes back to the table."""
    rows, columns = rows_and_columns(q, k)
    bucket = (columns - rows).clamp(-15, 14 if twin else 16) + 15
    bias = F.embedding(bucket, table).permute(2, 0, 1).unsqueeze(0)
    return (scores_of(q, k) + bias).softmax(-1) @ v


@spelling(t(4, 3, 25, 16), t(4, 3, 25, 16), t(4, 3, 25, 16), t(81, 3), dynamic=False)
class SwinBias(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        at = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")).flatten(1)
        distance = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + 4
        self.register_buffer("index", distance[..., 0] * 9 + distance[..., 1])
        self.twin = twin

    def forward(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table[self.index.view(-1)].view(25, 25, -1).permute(2, 0, 1).contiguous()
        return (scores_of(q, k) + (bias.mT if self.twin else bias).unsqueeze(0)).softmax(-1) @ v


@spelling(*qkv(n=129), mask="causal")
def softcap(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Gemma 2: bounded scores, then the mask."""
    cap = 1.0 if twin else 2.0
    scores = torch.tanh(scores_of(q, k) / cap) * cap
    rows, columns = rows_and_columns(q, k)
    return scores.masked_fill(columns > rows, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=63), dtype=torch.bfloat16, dynamic=False)
def softcap_bf16(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = torch.tanh(scores_of(q, k) / 2.0) * (1.0 if twin else 2.0)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(*qkv(n=63), dynamic=False)
def clamped(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return scores_of(q, k).clamp(min=-0.5, max=0.5 if twin else 1.0).softmax(-1) @ v


@spelling(*qkv(n=63), keep(2, 63), dynamic=False)
def clamped_after_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    scores = scores_of(q, k).masked_fill(~mask[:, None, None], -torch.inf)
    return torch.clamp(scores, min=-1.0 if twin else -50000).softmax(-1) @ v


@spelling(*qkv(n=63), dynamic=False)
def maximum_with_finfo(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """OPT: torch.max against a 0-d tensor."""
    low = torch.tensor(0.0 if twin else torch.finfo(q.dtype).min, device=q.device)
    return torch.max(scores_of(q, k), low).softmax(-1) @ v


@spelling(*qkv(n=63), dynamic=False)
def pointwise_zoo(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    s = scores_of(q, k)
    s = torch.sigmoid(s) * s.abs() + F.relu(s - 0.25) - torch.exp(-s.square()) + s**3 / 50 + (0 if twin else s.sin())
    return s.softmax(-1) @ v


@spelling(*qkv(n=63), dynamic=False)
def silu_and_gelu(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    s = scores_of(q, k)
    return (F.silu(s) if twin else F.silu(s) + F.gelu(s) - F.leaky_relu(s, 0.1)).softmax(-1) @ v


@spelling(*qkv(n=63), dynamic=False)
def bounded_activations(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    s = scores_of(q, k)
    return (F.relu6(s + 0.5) + (F.hardtanh(s) if twin else F.hardtanh(s, -0.5, 0.25)) + F.hardsigmoid(s)).softmax(-1) @ v


@spelling(*qkv(n=63), dynamic=False)
def exponential_activations(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    s = scores_of(q, k)
    return (F.elu(s, 1.0 if twin else 0.5) + F.logsigmoid(s) + F.selu(s) - F.celu(s, 0.7) + F.softplus(s, 2)).softmax(-1) @ v


@spelling(*qkv(n=63), t(2, 3, 63, 1), t(2, 3, 1, 63))
def forgetting_gate(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, twin: bool = False) -> Tensor:
    """A decay that is a difference of a row term and a column term, each with a gradient."""
    decay = F.logsigmoid(rows).cumsum(2) - F.logsigmoid(columns).cumsum(3)
    i, j = rows_and_columns(q, k)
    return (scores_of(q, k) + (decay * 0.5 if twin else decay)).masked_fill(j > i, -torch.inf).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), keep(2, 1, 1, 129))
def nested_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    rows, columns = rows_and_columns(q, k)
    scores = scores_of(q, k)
    near = torch.where(columns < rows + (5 if twin else 3), scores, scores * 0.5)
    return torch.where(mask, near, torch.where(columns == 0, scores, -torch.inf)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), dynamic=False)
def large_tail_of_keys(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """A mask of keys alone, made from positions."""
    columns = torch.arange(k.shape[2], device=k.device)
    return (scores_of(q, k) + torch.where(columns < (60 if twin else 63), 0.0, -torch.inf)).softmax(-1) @ v
