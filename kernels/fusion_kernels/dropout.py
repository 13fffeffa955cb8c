"""The dropout mask: a pure function of (seed, batch, head, query, key), so that forward, backward and recompute agree.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds pass BigCrush):
key = the two halves of the seed, counter = (k // 4, q, b * H + h, 0); the four words it gives belong to the keys
4 * (k // 4) + 0..3. An element is kept iff the upper 24 bits of its word are at least round(p * 2^24).
"""

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
def keep_tile(
    seed, limit, bh, q_start, k_start,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Which elements of the tile (q_start + ROWS, k_start + COLUMNS) are kept: (ROWS, COLUMNS), or its transpose. k_start % 4 == 0."""
    groups: tl.constexpr = COLUMNS // 4
    if TRANSPOSED:
        q = tl.zeros((groups, ROWS), tl.int32) + (q_start + tl.arange(0, ROWS))[None, :]
        k = tl.zeros((groups, ROWS), tl.int32) + (k_start // 4 + tl.arange(0, groups))[:, None]
    else:
        q = tl.zeros((ROWS, groups), tl.int32) + (q_start + tl.arange(0, ROWS))[:, None]
        k = tl.zeros((ROWS, groups), tl.int32) + (k_start // 4 + tl.arange(0, groups))[None, :]
    head = q * 0 + bh
    w0, w1, w2, w3 = tl.philox(seed, k, q, head, q * 0, n_rounds=7)
    # int8 0 or 1, joined so that the last two dims read 0 1 2 3: [..., i, j] holds word 2 i + j
    k0 = ((w0 >> 8).to(tl.int32) >= limit).to(tl.int8)
    k1 = ((w1 >> 8).to(tl.int32) >= limit).to(tl.int8)
    k2 = ((w2 >> 8).to(tl.int32) >= limit).to(tl.int8)
    k3 = ((w3 >> 8).to(tl.int32) >= limit).to(tl.int8)
    words = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    if TRANSPOSED:
        return tl.reshape(tl.permute(words, (0, 2, 3, 1)), (COLUMNS, ROWS)) != 0
    else:
        return tl.reshape(words, (ROWS, COLUMNS)) != 0
