"""Launching a Triton kernel for the second time, cheaply.

Triton looks at every argument of every launch to find the binary that was specialised for it; with some fifty arguments that
costs more than a small kernel runs. Here the caller names what the specialisation depends on in one hashable key, and a
launch with a known key goes to the binary itself: on a stream that is asked for once, past the hooks where nobody has set one,
and with addresses, which Triton takes as they are (a tensor it asks for its address, and the driver whether that is one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.errors import OutOfResources

from .assembler import chosen

__all__ = ["Launch"]

# Kernels count on x * y - z to be one rounding. Triton 3.9 warns where that is not asked for, and 3.10 will not do it unasked.
OPTIONS = {"enable_fp_fusion": True}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Launch:
    """A kernel with its grid and its constant arguments, for one key; called with a stream and the arguments that change.

    of: how a tensor is passed: as it is until there is a binary, from then on as its address. (A kernel is specialised for what
    a tensor is; the binary takes a number.)
    """

    def __init__(self, kernel: Any, grid: int, constants: Sequence[Any], warps: int, stages: int) -> None:
        self.kernel = kernel
        self.grid = (grid, 1, 1)
        self.constants = tuple(constants)
        self.warps, self.stages = warps, stages
        self.of: Callable[[torch.Tensor], Any] = _itself
        self._run: Any = None  # the binary with its grid, as Triton offers it: with hooks
        self._direct: Any = None  # what that comes down to
        self._fixed: tuple[Any, ...] = ()

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        if self._direct is not None and not _hooked():
            self._direct(*self.grid, stream, *self._fixed, *arguments, *self.constants)
        elif self._run is not None:
            self._run(*arguments, *self.constants, stream=stream)
        else:
            self._hold(self._first(*arguments))

    def _hold(self, binary: Any) -> None:
        if not isinstance(binary, triton.compiler.CompiledKernel):  # the interpreter returns nothing
            return
        self._run = binary[self.grid]
        self.of = torch.Tensor.data_ptr
        try:
            # the function, its packed metadata, the metadata of the launch and the two hooks: none
            self._fixed = (binary.function, binary.packed_metadata, None, None, None)
            self._direct = binary.run
        except AttributeError:  # a Triton that launches in another way
            self._direct = None

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


def _hooked() -> bool:
    """Whether somebody, a profiler, wants to hear of launches: a function, or a chain with something in it."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
