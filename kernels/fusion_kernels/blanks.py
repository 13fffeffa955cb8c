"""Memory to be: how and where the tensors lie that a call allocates, worked out once for all calls that look the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["Blank", "Place", "nested_as"]


_DIRECT = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


class Place:
    """The device of a plan. Allocations and launches go to the current device: it has to be that one."""

    def __init__(self, device: torch.device) -> None:
        self.index = device.index if device.type == "cuda" else None

    def current(self) -> bool:
        return self.index is None or torch._C._cuda_getDevice() == self.index

    def entered(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.current() else torch.cuda.device(self.index)

    def stream(self) -> int | None:
        """The handle of the device's current stream; None on a CPU."""
        return None if self.index is None else torch._C._cuda_getCurrentRawStream(self.index)


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

    def maker(self) -> Callable[[], Tensor]:
        """Allocates one, on the current device; that has to be the blank's.

        Past the dispatcher, where torch offers that (the code of Inductor allocates so too): it takes half as long.
        """
        direct = getattr(_DIRECT, f"_empty_strided_{self.device.type}", None)
        if direct is not None:
            return partial(direct, self.shape, self.strides, self.dtype)
        return partial(torch.empty_strided, self.shape, self.strides, dtype=self.dtype, device=self.device)

    def shadow(self) -> Tensor:
        """A tensor that looks like it, without memory."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")

    def settle(self, value: Tensor) -> Tensor:
        """`value` with the strides and the dtype of this blank: as it is, or a copy."""
        if value.dtype == self.dtype and (value.stride() == self.strides or self._alike(value)):
            return value
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device).copy_(value)

    def _alike(self, value: Tensor) -> bool:
        """Whether the strides agree where they count: in dims longer than one."""
        return all(n == 1 or a == b for n, a, b in zip(value.shape, value.stride(), self.strides, strict=True))
