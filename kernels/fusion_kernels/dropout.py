"""The dropout mask: a pure function of (seed, batch, head, query, key), so that forward, backward and recompute agree.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds pass BigCrush):
key = the two halves of the seed, counter = (k // 4, q, b * H + h, 0); the four words it gives belong to the keys
4 * (k // 4) + 0..3. An element is kept iff the upper 24 bits of its word are at least round(p * 2^24).
"""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep_tile", "threshold"]


def threshold(p: float) -> int:
    """The 24-bit word below which an element is dropped; p in [0, 1]."""
    return round(p * 2**24)


def keep_scale(p: float) -> float:
    """What a kept probability is multiplied by; p = 1 keeps nothing, and gives zeros."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


@triton.jit
def _product(a: tl.constexpr, x):
    """The high and the low word of a 32 x 32 bit product: one wide multiplication."""
    wide = x.to(tl.uint64) * a
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def _philox(seed, c0, c1, c2):
    """Philox4x32-7 of the counter (c0, c1, c2, 0); c0 and c1 broadcast, c2 is a number."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    c2 = c2.to(tl.uint32)
    c3 = tl.zeros_like(c2)
    for _ in tl.static_range(7):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_tile(
    seed, limit, bh, q_start, k_start,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which elements of the tile at (q_start, k_start) are kept: (ROWS, COLUMNS), or its transpose. k_start % 4 == 0."""
    groups: tl.constexpr = COLUMNS // 4
    if TRANSPOSED:
        q = (q_start + tl.arange(0, ROWS))[None, :]
        k = (k_start // 4 + tl.arange(0, groups))[:, None]
    else:
        q = (q_start + tl.arange(0, ROWS))[:, None]
        k = (k_start // 4 + tl.arange(0, groups))[None, :]
    w0, w1, w2, w3 = _philox(seed, k.to(tl.uint32), q.to(tl.uint32), bh)
    bound = limit.to(tl.uint32) << 8  # limit = 2^24 (p = 1) wraps to 0: `keep_scale` is 0 then
    # int8 0 or 1, joined so that the last two dims read 0 1 2 3: [..., i, j] holds word 2 i + j
    words = tl.join(
        tl.join((w0 >= bound).to(tl.int8), (w2 >= bound).to(tl.int8)),
        tl.join((w1 >= bound).to(tl.int8), (w3 >= bound).to(tl.int8)),
    )
    if TRANSPOSED:
        return tl.reshape(tl.permute(words, (0, 2, 3, 1)), (COLUMNS, ROWS)) != 0
    else:
        return tl.reshape(words, (ROWS, COLUMNS)) != 0
