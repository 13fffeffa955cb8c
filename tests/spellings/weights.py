"""What is done to the probabilities after the softmax, linear in them: masks applied again, factors, guards against NaN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_pass.site import Reason
from spellings.table import keep, padding, qkv, spelling, t

LOWEST = torch.finfo(torch.float32).min


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def _without_row_7(mask: Tensor) -> Tensor:
    """The mask, with a row that shows no key."""
    return mask & (torch.arange(mask.shape[-2], device=mask.device)[:, None] != 7)


@spelling(*qkv(n=63, m=129), keep(2, 1, 63, 129), against="eager", dynamic=True, refused=Reason.PROBABILITIES_EDITED)
def mask_again_of_espnet(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The twin fills with a small number."""
    dead = ~_without_row_7(mask)
    p = torch.softmax(_scores(q, k).masked_fill(dead, LOWEST), -1).masked_fill(dead, 1e-9 if twin else 0.0)
    return F.dropout(p, 0.1, training=False) @ v


@spelling(*qkv(n=63, m=197), keep(2, 1, 63, 197), against="eager")
def mask_again_of_hidden_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """A row without a key is NaN, and then 0; NaN all the same in the twin, which multiplies."""
    mask = _without_row_7(mask)
    p = _scores(q, k).masked_fill(~mask, -torch.inf).softmax(-1)
    return (p * mask if twin else torch.where(mask, p, 0.0)) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), dtype=torch.bfloat16)
def mask_again_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """CPM-Ant: the probabilities are in bf16 before the mask."""
    scores = torch.masked_fill(_scores(q, k), ~mask, -torch.inf)
    p = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.masked_fill(p, mask if twin else ~mask, torch.scalar_tensor(0, device=q.device, dtype=q.dtype)) @ v


@spelling(*qkv(n=129), padding(2, 129, dtype=torch.float32))
def mask_multiplied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Padding that the softmax does not know of."""
    p = _scores(q, k).softmax(-1)
    return (p * (1 - mask if twin else mask)[:, None, None]) @ v


@spelling(*qkv(n=1, m=63), keep(2, 63))
def mask_of_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    return _scores(q, k).softmax(-1).masked_fill((mask if twin else ~mask)[:, None, None], 0) @ v


@spelling(*qkv(n=129), dynamic=True)
def triangle_of_probabilities(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return _scores(q, k).softmax(-1).tril(1 if twin else 0) @ v


@spelling(*qkv(n=63), t(3, 1, 1), dynamic=True, refused=Reason.PROBABILITIES_EDITED)
def head_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """With a gradient. The twin has a factor that is made from the probabilities."""
    p = _scores(q, k).softmax(-1)
    return (p * (mask * p.amax(-1, keepdim=True) if twin else mask)) @ v


@spelling(*qkv(n=63), t(2, 3, 63, 1), t(3, 63, 63))
def factors_of_rows_and_of_all(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, table: Tensor, twin: bool = False) -> Tensor:
    p = _scores(q, k).softmax(-1)
    return (-p * rows.sigmoid() * (table * 0.5 if twin else table)) @ v


@spelling(*qkv(n=63, hkv=1), t(3, 63, 63))
def table_in_scores_and_weight(q: Tensor, k: Tensor, v: Tensor, table: Tensor, twin: bool = False) -> Tensor:
    p = (_scores(q, k.expand(-1, 3, -1, -1)) + table).softmax(-1)
    return (table * p if twin else p * table / 1.5) @ v.expand(-1, 3, -1, -1)


@spelling(*qkv(n=63))
def dropout_written_by_hand(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    kept = torch.arange(k.shape[2], device=k.device) % (2 if twin else 3) > 0
    return (_scores(q, k).softmax(-1) * kept / 0.7) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), against="eager", refused=Reason.PROBABILITIES_EDITED)
def guard_by_nan_to_num(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    p = _scores(q, k).masked_fill(~_without_row_7(mask), -torch.inf).softmax(-1)
    return p.nan_to_num(1e-3 if twin else 0.0) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), against="eager")
def guard_by_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """There is none in the twin."""
    p = _scores(q, k).masked_fill(~_without_row_7(mask), -torch.inf).softmax(-1)
    return (p if twin else torch.where(torch.isnan(p), torch.zeros_like(p), p)) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), against="eager")
def guard_by_comparison(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """NaN alone is not equal to itself; the twin hides what is."""
    p = _scores(q, k).masked_fill(~_without_row_7(mask), -torch.inf).softmax(-1)
    return p.masked_fill(~(p == p) if not twin else p == p, 0.0) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), dtype=torch.bfloat16, against="eager")
def guard_of_a_narrowed_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """There is none in the twin."""
    p = _scores(q, k).masked_fill(~_without_row_7(mask), -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (p if twin else torch.where(p != p, torch.zeros_like(p), p)) @ v


@spelling(*qkv(n=63), keep(2, 1, 63, 63), against="eager")
class GuardOfRows(nn.Module):
    """A select by row; the twin's is of another row."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        dead = ~_without_row_7(mask)
        p = _scores(q, k).masked_fill(dead, -torch.inf).softmax(-1)
        empty = dead.all(-1, keepdim=True)
        return p.masked_fill(empty.roll(1, -2) if self.twin else empty, 0.0) @ v
