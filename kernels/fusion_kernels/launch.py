"""Launching a Triton kernel for the second time, cheaply.

Triton looks at every argument of every launch to find the binary that was specialised for it; with some fifty arguments that
costs more than a small kernel runs. Here the caller names what the specialisation depends on in one hashable key, and a
launch with a known key goes to the binary itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from triton.runtime.errors import OutOfResources

from .assembler import chosen

__all__ = ["Launch"]

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
                with chosen():
                    return self.kernel[self.grid](*arguments, *self.constants, num_warps=self.warps, num_stages=stages, **OPTIONS)
            except OutOfResources:
                if stages == 1:
                    raise
        return None
