"""Memory to be: how the tensors that the ops return lie, worked out once and allocated at every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Blank", "nested_as"]


def _less(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(a < b)


def nested_as(shape: Sequence[Any], like: Tensor) -> tuple[Any, ...]:
    """Strides of a dense tensor whose first three dims are nested in memory as `like`'s are, the last dim innermost."""
    order = [0, 1, 2]
    for i in (1, 2):  # insertion sort by falling stride; a dim that cannot be compared keeps its place
        for j in range(i, 0, -1):
            if not _less(like.stride(order[j - 1]), like.stride(order[j])):
                break
            order[j - 1], order[j] = order[j], order[j - 1]
    strides: list[Any] = [0, 0, 0, 1]
    step = shape[3]
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return tuple(strides)


@dataclass(frozen=True)
class Blank:
    """An empty tensor to be."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def nested(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Blank:
        return Blank(tuple(shape), nested_as(shape, like), dtype, like.device)

    @staticmethod
    def contiguous(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Blank:
        return Blank(tuple(shape), torch.empty(shape, device="meta").stride(), dtype, device)

    def new(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def shadow(self) -> Tensor:
        """A tensor that looks like it, without memory."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")

    def settle(self, value: Tensor) -> Tensor:
        """`value` with the strides and the dtype of this blank: as it is, or a copy."""
        if value.dtype == self.dtype and (value.stride() == self.strides or self._alike(value)):
            return value
        return self.new().copy_(value)

    def _alike(self, value: Tensor) -> bool:
        """Whether the strides agree where they count: in dims longer than one."""
        return all(n == 1 or a == b for n, a, b in zip(value.shape, value.stride(), self.strides, strict=True))
