"""What a call looks like, as a hashable key: what was worked out for one call serves every other that looks the same."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

__all__ = ["Plans", "allows_tf32", "number", "signature"]


def signature(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What decides how tensors are read: types, shapes (they make grids), strides, device, and alignment (to 16 bytes)."""
    return tuple([None if t is None else (t.dtype, t.shape, t.stride(), t.device, t.data_ptr() & 15) for t in tensors])


def number(value: int) -> tuple[bool, bool, bool]:
    """What Triton's specialisation can see of an integer."""
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


def allows_tf32() -> bool:
    """Whether eager's fp32 products may round to tf32. Reading `allow_tf32` raises once `fp32_precision` was set: read that."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class Plans(dict[Hashable, Any]):
    """What was worked out for a key. Bounded: after thousands of shapes it starts over (Triton keeps the binaries)."""

    LIMIT = 4096

    def __setitem__(self, key: Hashable, value: Any) -> None:
        if len(self) >= self.LIMIT:
            self.clear()
        super().__setitem__(key, value)
