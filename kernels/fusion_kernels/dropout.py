"""The dropout mask: a pure function of (seed, batch, head, query, key), so that forward, backward and recompute agree.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds pass BigCrush):
key = the two halves of the seed, counter = (k // 8, q, b * H + h, 0). Word i of the four that it gives belongs to the keys
8 * (k // 8) + 2 i and, with its upper and lower 16 bits exchanged, + 2 i + 1. An element is kept iff the upper 24 bits of its
word are at least round(p * 2^24): each has the rate of 24 bits, and two neighbours that share a word depend on one another
only where the upper half of one of them equals the threshold's, once in 2^16.
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
def _turned(word):
    """The upper and the lower half exchanged."""
    return (word << 16) | (word >> 16)


@triton.jit
def _four(w0, w1, w2, w3, bound):
    """Which words reach the bound: [..., i, j] is of word 2 i + j."""
    return tl.join(
        tl.join((w0 >= bound).to(tl.int8), (w2 >= bound).to(tl.int8)),
        tl.join((w1 >= bound).to(tl.int8), (w3 >= bound).to(tl.int8)),
    )


@triton.jit
def keep_tile(
    seed, limit, bh, q_start, k_start,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which elements of the tile at (q_start, k_start) are kept: (ROWS, COLUMNS), or its transpose. k_start % 8 == 0."""
    groups: tl.constexpr = COLUMNS // 8
    if TRANSPOSED:
        q = (q_start + tl.arange(0, ROWS))[None, :]
        k = (k_start // 8 + tl.arange(0, groups))[:, None]
    else:
        q = (q_start + tl.arange(0, ROWS))[:, None]
        k = (k_start // 8 + tl.arange(0, groups))[None, :]
    w0, w1, w2, w3 = _philox(seed, k.to(tl.uint32), q.to(tl.uint32), bh)
    bound = limit.to(tl.uint32) << 8  # limit = 2^24 (p = 1) wraps to 0: `keep_scale` is 0 then
    # int8 0 or 1, joined so that the last three dims read 0 to 7: [..., i, j, l] holds word 2 i + j, turned if l
    kept = tl.join(_four(w0, w1, w2, w3, bound), _four(_turned(w0), _turned(w1), _turned(w2), _turned(w3), bound))
    if TRANSPOSED:
        return tl.reshape(tl.permute(kept, (0, 2, 3, 4, 1)), (COLUMNS, ROWS)) != 0
    else:
        return tl.reshape(kept, (ROWS, COLUMNS)) != 0
