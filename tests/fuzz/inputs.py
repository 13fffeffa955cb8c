"""The tensors that a written program takes: how they are described, drawn, and laid out in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Input", "make"]


@dataclass(frozen=True)
class Input:
    """One tensor argument.

    kind: ``normal`` (values of standard deviation `scale`), ``keep`` (bool, seven in ten True), ``additive`` (0 or `fill`, from
    ``keep``), ``ids`` (int64 below 3, ascending).
    order: the dims from outermost to innermost in memory; None is contiguous.
    dead: some rows of a mask hide every key; elsewhere the first key is always visible.
    poison: this value stands at one place that the seed decides.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "normal"
    dtype: torch.dtype | None = None
    grad: bool = False
    order: tuple[int, ...] | None = None
    scale: float = 1.0
    fill: float = float("-inf")
    dead: bool = False
    poison: float | None = None


def _kept(x: Input, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    kept = torch.rand(tuple(shape), generator=generator) < 0.7
    if not shape:
        return kept | (not x.dead)
    kept[..., 0] = True
    if x.dead:
        kept &= torch.rand((*shape[:-1], 1), generator=generator) < 0.7
    return kept


def _value(x: Input, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if x.kind == "normal":
        return (torch.randn(x.shape, generator=generator, dtype=torch.float64) * x.scale).to(dtype)
    if x.kind == "ids":
        return torch.randint(3, x.shape, generator=generator).sort(-1).values
    kept = _kept(x, x.shape, generator)
    if x.kind == "keep":
        return kept.to(dtype)
    fill = x.fill if math.isinf(x.fill) else max(x.fill, torch.finfo(dtype).min)
    return torch.zeros(x.shape, dtype=dtype).masked_fill(~kept, fill)


def make(inputs: Sequence[Input], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The tensors, drawn from `seed` alone; `dtype` is the program's own, for inputs that name none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for x in inputs:
        value = _value(x, generator, x.dtype or dtype)
        if x.poison is not None and value.numel():
            value.view(-1)[int(torch.randint(value.numel(), (), generator=generator))] = x.poison
        if x.order is not None:
            back = [x.order.index(d) for d in range(len(x.order))]
            value = value.permute(x.order).contiguous().permute(back)
        made.append(value.requires_grad_(x.grad))
    return made
