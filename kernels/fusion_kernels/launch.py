"""Launching a Triton kernel for the second time, cheaply.

Triton looks at every argument of every launch to find the binary that was specialised for it; with some fifty arguments that
costs more than a small kernel runs. Here the caller names what the specialisation depends on in one hashable key, and a
launch with a known key goes to the binary itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

__all__ = ["Launch", "Plans", "number", "signature"]

# Kernels count on x * y - z to be one rounding. Triton 3.9 warns where that is not asked for, and 3.10 will not do it unasked.
OPTIONS = {"enable_fp_fusion": True}


class Launch:
    """A kernel with its grid and its constant arguments, for one key; called with the arguments that change."""

    def __init__(self, kernel: Any, grid: int, constants: Sequence[Any], warps: int, stages: int) -> None:
        self.kernel = kernel
        self.grid = (grid, 1, 1)
        self.constants = tuple(constants)
        self.warps, self.stages = warps, stages
        self.run: Any = None

    def __call__(self, *arguments: Any) -> None:
        if self.run is not None:
            self.run(*arguments, *self.constants)
            return
        binary = self._first(*arguments)
        if isinstance(binary, triton.compiler.CompiledKernel):  # the interpreter returns nothing
            self.run = binary[self.grid]

    def _first(self, *arguments: Any) -> Any:
        """Compiles and launches; on a device with less shared memory than the measured one, with fewer tiles in flight."""
        for stages in range(self.stages, 0, -1):
            try:
                return self.kernel[self.grid](*arguments, *self.constants, num_warps=self.warps, num_stages=stages, **OPTIONS)
            except OutOfResources:
                if stages == 1:
                    raise
        return None


def signature(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What Triton's specialisation can see of tensors: types, shapes (they make grids), strides and 16-byte alignment."""
    return tuple(None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16 == 0) for t in tensors)


def number(value: int) -> tuple[bool, bool, bool]:
    """What Triton's specialisation can see of an integer."""
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31


class Plans(dict[Hashable, Any]):
    """What was worked out for a key. Bounded: after thousands of shapes it starts over (Triton keeps the binaries)."""

    LIMIT = 4096

    def __setitem__(self, key: Hashable, value: Any) -> None:
        if len(self) >= self.LIMIT:
            self.clear()
        super().__setitem__(key, value)
