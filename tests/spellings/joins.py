"""Masks and biases that are put together or padded: read part by part where a part is read alone, loaded whole elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_pass.site import Reason
from spellings.table import keep, qkv, spelling, t


@spelling(*qkv(n=63, m=64), keep(2, 63), dynamic=True)
def mask_with_a_column_in_front(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """The class token is always seen; in the twin it never is."""
    first = torch.zeros_like(mask[:, :1]) if twin else torch.ones_like(mask[:, :1])
    mask = torch.cat([first, mask], dim=1)[:, None, None, :]
    return (q @ k.mT * 0.25).masked_fill(~mask, -1e9).softmax(-1) @ v


@spelling(*qkv(n=63, m=65), t(3, 63, 63))
def bias_padded_on_both_sides(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    """The column of a register at each end has no bias; in the twin a large one."""
    return (q @ k.mT * 0.25 + F.pad(bias, (1, 1), value=5.0 if twin else 0.0)).softmax(-1) @ v


@spelling(*qkv(n=63), t(3, 64, 63), dynamic=True)
def bias_padded_and_cut_again(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    """What is cut off is never read; the twin cuts at the other end."""
    padded = torch.cat([F.pad(bias, (2, 0)), F.pad(bias, (0, 2))], dim=1)
    part = padded[:, 1:64, :63] if twin else padded[:, 1:64, 2:]
    return (q @ k.mT * 0.25 + part).softmax(-1) @ v


@spelling(*qkv(n=63), refused=Reason.NOT_EXPRESSIBLE)
def mask_of_scores_with_a_column(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """A mask put together of positions; of scores in the twin."""
    scores = q @ k.mT * 0.25
    one = torch.ones(63, 1, dtype=torch.bool, device=q.device)
    rest = scores[..., 1:] > 0 if twin else one[:, :, None].expand(63, 1, 62)[:, 0].tril()
    mask = torch.cat([one.expand(*rest.shape[:-1], 1), rest], dim=-1)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
