"""Causal masks made of ones and numbers: a function of the scores and of an offset, 0 for causal, 1 for what is one edit away.

`PROVED` is read by tests/test_causal_masks.py as well, which compares what is proved with what eager hides.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from spellings.table import qkv, spelling

__all__ = ["PROVED", "UNPROVED"]

Masked = Callable[[Tensor, int], Tensor]  # (scores (..., n, n), offset) -> scores with the mask

LOW = torch.finfo(torch.float32).min
INF = float("inf")
PROVED: dict[str, Masked] = {}
UNPROVED: dict[str, Masked] = {}  # exact, too, but a score could be larger than what hides it
_lengths = cycle((63, 129, 197))


def causal(fn: Masked) -> Masked:
    """A row of the table of spellings, of which the report has to say that it is causal."""
    PROVED[fn.__name__] = fn
    _register(fn, "causal: k <= q")
    return fn


def unproved(fn: Masked) -> Masked:
    UNPROVED[fn.__name__] = fn
    _register(fn, None)
    return fn


def _register(fn: Masked, mask: str | None) -> None:
    def row(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
        return fn(q @ k.mT * 0.25, int(twin)).softmax(-1) @ v

    row.__name__ = f"causal_{fn.__name__}"
    spelling(*qkv(n=next(_lengths)), mask=mask)(row)


def lower(s: Tensor, off: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    n = s.shape[-1]
    return torch.tril(torch.ones(n, n, dtype=dtype, device=s.device), diagonal=-off)


def upper(s: Tensor, off: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    n = s.shape[-1]
    return torch.triu(torch.ones(n, n, dtype=dtype, device=s.device), diagonal=1 - off)


# ---------------------------------------------------------------- chosen


@causal
def triu_filled(s: Tensor, off: int) -> Tensor:
    return s.masked_fill(upper(s, off, torch.bool), -INF)


@causal
def tril_is_zero(s: Tensor, off: int) -> Tensor:
    return s.masked_fill(lower(s, off) == 0, -INF)


@causal
def tril_is_zero_finite(s: Tensor, off: int) -> Tensor:
    return s.masked_fill(lower(s, off).view(1, 1, *s.shape[-2:]).eq(0), -1e9)


@causal
def integers_are_zero(s: Tensor, off: int) -> Tensor:
    return s.masked_fill(lower(s, off, torch.int64) == 0, -INF)


@causal
def triu_to_bool(s: Tensor, off: int) -> Tensor:
    return s.masked_fill(upper(s, off).bool(), -INF)


@causal
def tril_to_bool_negated(s: Tensor, off: int) -> Tensor:
    return s.masked_fill(~lower(s, off).to(torch.bool), -INF)


@causal
def bytes_are_one(s: Tensor, off: int) -> Tensor:
    """The annotated transformer: subsequent_mask, and mask == 0 twice."""
    allowed = upper(s, off)[None].type(torch.uint8) == 0
    return s.masked_fill(allowed == 0, -1e9)


@causal
def triu_above_a_half(s: Tensor, off: int) -> Tensor:
    return s.masked_fill(upper(s, off) > 0.5, -INF)


@causal
def one_minus_tril_to_bool(s: Tensor, off: int) -> Tensor:
    return s.masked_fill((1 - lower(s, off)).bool(), -INF)


@causal
def where_tril_is_one(s: Tensor, off: int) -> Tensor:
    return torch.where(lower(s, off) == 1, s, torch.tensor(-INF, device=s.device))


@causal
def where_transposed(s: Tensor, off: int) -> Tensor:
    allowed = (torch.triu(torch.ones_like(s[0, 0]), diagonal=off) == 1).transpose(0, 1)
    return torch.where(allowed.logical_not(), -INF, s)


@causal
def difference_of_positions(s: Tensor, off: int) -> Tensor:
    i = torch.arange(s.shape[-1], device=s.device)
    return s.masked_fill((i[:, None] - i[None, :]) < off, -INF)


@causal
def minimum_with_a_mask(s: Tensor, off: int) -> Tensor:
    return torch.minimum(s, torch.where(lower(s, off) == 1, INF, -1e9))


# ---------------------------------------------------------------- added


@causal
def one_minus_tril_times_finfo(s: Tensor, off: int) -> Tensor:
    return s + (1.0 - lower(s, off)) * LOW


@causal
def full_triu(s: Tensor, off: int) -> Tensor:
    return s + torch.triu(torch.full(s.shape[-2:], -INF, device=s.device), diagonal=1 - off)


@causal
def ones_times_infinity(s: Tensor, off: int) -> Tensor:
    return s + torch.triu(torch.ones(s.shape[-2:], device=s.device) * -INF, diagonal=1 - off)


@causal
def square_subsequent_mask(s: Tensor, off: int) -> Tensor:
    """torch's Transformer until 1.12."""
    mask = (torch.triu(torch.ones(s.shape[-2:], device=s.device), diagonal=off) == 1).transpose(0, 1)
    return s + mask.float().masked_fill(mask == 0, -INF).masked_fill(mask == 1, 0.0)


@causal
def log_of_tril(s: Tensor, off: int) -> Tensor:
    return s + lower(s, off).log()


@causal
def nan_to_num_of_log(s: Tensor, off: int) -> Tensor:
    return s + torch.nan_to_num(lower(s, off).log(), neginf=LOW)


@causal
def zeros_filled(s: Tensor, off: int) -> Tensor:
    return s + torch.zeros(s.shape[-2:], device=s.device).masked_fill(lower(s, off) == 0, -INF)


@causal
def inverse_filled(s: Tensor, off: int) -> Tensor:
    inverse = 1.0 - lower(s, off)
    return s + inverse.masked_fill(inverse.bool(), LOW)


@causal
def subtracted(s: Tensor, off: int) -> Tensor:
    """XLNet, Transformer-XL."""
    return s - 1e30 * upper(s, off)


@causal
def positions_and_triu(s: Tensor, off: int) -> Tensor:
    """Llama in transformers 4.38: the mask is made by triu, and multiplied with a comparison of positions."""
    i = torch.arange(s.shape[-1], device=s.device)
    mask = torch.triu(torch.full(s.shape[-2:], LOW, device=s.device), diagonal=1 - off)
    return s + (mask * (i > i.reshape(-1, 1) - off))[None, None].expand(2, 1, -1, -1)


@causal
def positions_added(s: Tensor, off: int) -> Tensor:
    """BART's _make_causal_mask."""
    i = torch.arange(s.shape[-1], device=s.device)
    mask = torch.full(s.shape[-2:], LOW, device=s.device)
    return s + mask.masked_fill_(i < (i + 1 - off).view(-1, 1), 0)


# ---------------------------------------------------------------- multiplied


@causal
def multiplied_and_added(s: Tensor, off: int) -> Tensor:
    """The first GPT."""
    allowed = lower(s, off)
    return s * allowed + -1e9 * (1 - allowed)


@causal
def multiplied_and_subtracted(s: Tensor, off: int) -> Tensor:
    allowed = lower(s, off)
    return s * allowed - 1e4 * (1 - allowed)


# ---------------------------------------------------------------- what a score of 1e9 would see through


@unproved
def one_minus_tril_times_a_number(s: Tensor, off: int) -> Tensor:
    return s + (1.0 - lower(s, off)) * -10000.0


@unproved
def triu_times_a_number(s: Tensor, off: int) -> Tensor:
    return s + upper(s, off) * -1e9
