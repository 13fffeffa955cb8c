"""The dropout mask: a pure function of (seed, batch, head, query, key), so that forward, backward and recompute agree.

Each row gets two random words, from Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): key = the two halves of the seed, counter = (q, b * H + h, 0, 0). Along the row they become one word for each two keys,
k and k + 8 (of each 16), by one wide product whose halves are folded:

    x = fold((word0 + k * 0x9E3779B9) * (word1 ^ k * 0x85EBCA6B))        fold(high, low) = high ^ low

The key k + 8 is kept iff x >= p 2^32, the key k iff x with its halves exchanged is. (Each is exact; that both depend on all of x
shows where half of x is just the half of p 2^32: once in 2^16.) The sum beside the xor matters: with two sums three keys at equal
distances are dependent (their third moment 60 deviations off, over 2^20 rows; with the xor 4, of 40,000 moments).

The instructions decide. With Philox for every element (four keys a counter) a forward of 1.0 ms took 1.9 ms and a backward of 3.0
took 7.0; with a word for each key, mixed by two multipliers, 1.50 and 4.46; with these words, 1.21 and 4.03 (H200, bf16, B = 4,
H = 16, N = 4096, D = 128). Keys in twos 8 apart are in one thread, in the layout of the products, be they columns (in the
forward) or rows (in dk, dv); four in a row are not, and have to be moved there.
"""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep", "keep_scale", "row_words", "threshold"]


def threshold(p: float) -> int:
    """The word below which an element is dropped, p 2^32, as a signed 32-bit number; p in [0, 1]."""
    word = min(round(p * 2**32), 2**32 - 1)
    return word - 2**32 if word >= 2**31 else word


def keep_scale(p: float) -> float:
    """What a kept probability is multiplied by; p = 1 keeps nothing, and gives zeros."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


@triton.jit
def _product(a: tl.constexpr, x):
    """The high and the low word of a 32 x 32 bit product: one wide multiplication."""
    wide = x.to(tl.uint64) * a
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def row_words(seed, bh, rows):
    """The two words of each row, (ROWS,) uint32: Philox4x32-7 of the counter (row, bh, 0, 0)."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    c0 = rows.to(tl.uint32)
    c1 = tl.zeros_like(c0) + bh.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(7):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1


@triton.jit
def keep(word0, word1, start, places, limit):
    """Which elements are kept, of the keys start + places: words and places broadcast, (ROWS, 1) and (1, KEYS) or turned.

    start: a multiple of 16. places: a range from 0 on; that its bits are known is what makes one word of two.
    """
    pair = (start + (places & -9)).to(tl.uint32)
    wide = (word0 + pair * 0x9E3779B9).to(tl.uint64) * (word1 ^ (pair * 0x85EBCA6B)).to(tl.uint64)
    x = (wide >> 32).to(tl.uint32) ^ wide.to(tl.uint32)
    x = tl.where((places & 8) != 0, x, (x << 16) | (x >> 16))
    return x >= limit.to(tl.uint32, bitcast=True)
