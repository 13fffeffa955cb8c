"""Which keys do the tensors of a call leave alive? Padding, asked once a call, so that the kernels skip the tiles that it hides.

A predicate that reads tensors at (b, h, k), and neither the query nor the score (`tiles.key_mask`), hides a key from every query.
One small kernel looks at it along k for each batch and head that it tells apart, and writes four numbers: the first live key
and one past the last, then a range in which every key is alive, so that no tile inside needs the mask. These are the same two
numbers for padding on the right or on the left; for a mask with holes it is the longer of the runs at the two ends.
The bounds of a tile (`codegen.bounds`) are narrowed by them. It costs one launch, and one read of the mask.
"""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch
from .program import Program
from .tiles import key_mask

__all__ = ["KeyRanges"]

_BLOCK = 8192  # most keys looked at together
_WARPS = 8


@triton.jit
def _chunk(i, b, h, sizes, aux, KEY_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The i-th keys, (BLOCK,), which of them are there, and which of these are alive."""
    keys = i * BLOCK + tl.arange(0, BLOCK)
    there = keys < sizes[3]
    return keys, there, there & KEY_MASK(b, h, keys, there, sizes, aux)


@triton.jit(do_not_specialize=["heads", "B", "H", "N"])
def _key_ranges(ranges, aux, heads, B, H, N, M, KEY_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """ranges[pid] = (lo, hi, all_lo, all_hi): no key outside [lo, hi) is alive, every key of [all_lo, all_hi) is."""
    pid = tl.program_id(0)
    b = pid // heads
    h = pid % heads
    sizes = (B, H, N, M)
    low = tl.full((BLOCK,), 2147483647, tl.int32)
    high = tl.zeros((BLOCK,), tl.int32)
    number = tl.zeros((BLOCK,), tl.int32)
    for i in tl.range(0, tl.cdiv(M, BLOCK)):
        keys, _, alive = _chunk(i, b, h, sizes, aux, KEY_MASK, BLOCK)
        low = tl.minimum(low, tl.where(alive, keys, 2147483647))
        high = tl.maximum(high, tl.where(alive, keys + 1, 0))
        number += alive.to(tl.int32)
    hi = tl.max(high, 0)
    lo = tl.minimum(tl.min(low, 0), hi)
    holes = tl.sum(number, 0) < hi - lo
    early = tl.full((BLOCK,), 2147483647, tl.int32)
    late = tl.zeros((BLOCK,), tl.int32)
    for i in tl.range(0, tl.where(holes, tl.cdiv(M, BLOCK), 0)):  # the first hole, and one past the last
        keys, there, alive = _chunk(i, b, h, sizes, aux, KEY_MASK, BLOCK)
        hole = there & (alive == 0) & (keys >= lo) & (keys < hi)
        early = tl.minimum(early, tl.where(hole, keys, 2147483647))
        late = tl.maximum(late, tl.where(hole, keys + 1, 0))
    all_hi = tl.minimum(tl.min(early, 0), hi)
    all_lo = tl.maximum(tl.max(late, 0), lo)
    left = all_hi - lo >= hi - all_lo
    tl.store(ranges + 4 * pid, lo)
    tl.store(ranges + 4 * pid + 1, hi)
    tl.store(ranges + 4 * pid + 2, tl.where(left, lo, all_lo))
    tl.store(ranges + 4 * pid + 3, tl.where(left, all_hi, hi))


class KeyRanges:
    """The launch for one kind of call; gives aux with the ranges, (batches, heads, 4) int32, and their strides at its end.

    Args:
        program: one with a `tiles.key_mask`. function: its device function, `codegen.key_mask`.
        sizes: B, H, N, M of the calls.
    """

    def __init__(self, program: Program, function: Any, sizes: tuple[int, int, int, int]) -> None:
        mask = key_mask(program)
        assert mask is not None
        batches = sizes[0] if mask.depends_on("b") else 1
        heads = sizes[1] if mask.depends_on("h") else 1
        self.shape = (batches, heads, 4)
        self.strides = (4 * heads if batches > 1 else 0, 4 if heads > 1 else 0)
        block = min(_BLOCK, max(16, triton.next_power_of_2(sizes[3])))
        self.launch = Launch(_key_ranges, batches * heads, (heads, *sizes, function, block), _WARPS, 1)

    def __call__(self, aux: tuple[Any, ...], device: torch.device, stream: int | None = None) -> tuple[Any, ...]:
        ranges = torch.empty(self.shape, dtype=torch.int32, device=device)
        self.launch(stream, ranges, aux)
        return (*aux, ranges, *self.strides)
