"""The dropout mask: a pure function of (seed, batch, head, query, key), so that forward, backward and recompute agree.

Each row gets two random words, from Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): key = the two halves of the seed, counter = (q, b * H + h, 0, 0). Along the row they become one word a key:

    x = word0 + k * 0x9E3779B9              a Weyl sequence that starts at random
    x = (x ^ x >> 16) * 0x7FEB352D + word1  no two rows walk the same sequence, even where their starts overlap
    x = (x ^ x >> 15) * 0x846CA68B

The multipliers and shifts are those of the mixer "lowbias32" (Wellons, "Prospecting for hash functions", 2018); its last
shift is left out, for only upper bits are used. An element is kept iff the upper 24 bits of x are at least round(p * 2^24).

Philox for every element (four keys a counter) made a forward of 1.0 ms 1.9 ms long and a backward of 3.3 ms 7.0 (H200, bf16,
B = 4, H = 16, N = 4096, D = 128); with these words they take 1.5 and 4.4 ms. They are made where the element is, too: words that
come in fours have to be moved there.
"""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["keep", "keep_scale", "load_words", "row_words", "threshold"]


def threshold(p: float) -> int:
    """The 24-bit word below which an element is dropped; p in [0, 1]."""
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
def load_words(words, rows, stride, size):
    """The two words of each row from (2, B * H * N) int32 memory: words points at the first row's, the second is `stride` on."""
    word0 = tl.load(words + rows, mask=rows < size, other=0)
    word1 = tl.load(words + stride + rows, mask=rows < size, other=0)
    return word0.to(tl.uint32, bitcast=True), word1.to(tl.uint32, bitcast=True)


@triton.jit
def keep(word0, word1, start, places, limit):
    """Which elements are kept: the words of the rows, and the keys start + places, broadcast: (ROWS, 1) and (1, KEYS), or turned."""
    pair = (start + (places & 0xF7)).to(tl.uint32)
    wide = (word0 + pair * 0x9E3779B9).to(tl.uint64) * (word1 ^ (pair * 0x85EBCA6B)).to(tl.uint64)
    x = (wide >> 32).to(tl.uint32) ^ wide.to(tl.uint32)
    x = tl.where((places & 8) != 0, x, (x << 16) | (x >> 16))
    return x >= limit.to(tl.uint32, bitcast=True)
