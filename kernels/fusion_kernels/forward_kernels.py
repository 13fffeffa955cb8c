"""The Triton kernel of the forward; see `forward` for what its tiles are and how the softmax is carried."""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from .device import LOG2E, awaited, dot, dot_pair, load_rows, store_rows, stream_rows, tile_ranges, visited
from .dropout import keep, row_words

__all__ = ["forward_tiles"]


# Scores that can be large (`Phase.wide`) take two roundings an element on their way to the exponential instead of one. That is
# tried without where a tensor is added in every tile: a learned bias is small, and few rows are hidden whole. A peak of NARROW
# shifts all of its row by at most 2^-8, which the sum of the row takes out again.
NARROW = tl.constexpr(65536.0)


@triton.jit
def _loop(
    acc0, acc1, peak, total,  # (BLOCK_M, V0), (BLOCK_M, V1), (BLOCK_M,), (BLOCK_M,)
    q0, q1, k, v, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux, word0, word1, limit,
    first, cut, jump, count,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr, TRY: tl.constexpr, INF_ROWS: tl.constexpr,
    WEIGHT: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax over `count` key tiles: first, first + 1, ... with `jump` of them left out after `cut`."""
    M = sizes[3]
    q = q_start + tl.arange(0, BLOCK_M)
    for i in tl.range(0, count):
        start = visited(i, first, cut, jump) * BLOCK_N
        keys = start + tl.arange(0, BLOCK_N)
        k0 = stream_rows(k, k_strides, b, kv_head, start, M, 0, D0, D, BLOCK_N, TAIL, TMA)
        k1 = k0
        if D1 > 0:
            k1 = stream_rows(k, k_strides, b, kv_head, start, M, D0, D1, D, BLOCK_N, TAIL, TMA)
        s = dot_pair(q0, q1, k0, k1, D1 > 0, PRECISION)  # (BLOCK_M, BLOCK_N)
        if TAIL:
            k_ok = (keys < M)[None, :]
            x = SCORE(s, b, h, q[:, None], keys[None, :], q_ok, k_ok, sizes, aux)
            x = tl.where(k_ok, x, float("-inf"))
        else:
            x = SCORE(s, b, h, q[:, None], keys[None, :], q_ok, True, sizes, aux)
        higher = tl.maximum(peak, tl.max(x, 1) * FACTOR)
        if TRY:
            higher = tl.where(higher == float("-inf"), higher, tl.maximum(higher, -NARROW))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row of -inf so far adds nothing (-inf - -inf is NaN)
        if INF_ROWS:  # the sum of a row with +inf is exp2(inf), not exp2(inf - inf), so that lse is +inf
            finite = tl.where(higher == float("inf"), 0.0, finite)
        if WIDE:
            p = tl.math.exp2((x - finite[:, None]) * LOG2E)
            decay = tl.math.exp2((peak - finite) * LOG2E)
        else:
            shift = tl.fma(finite, LOG2E, 0.0)  # rounded here, the same in every use
            p = tl.math.exp2(x * (FACTOR * LOG2E) - shift[:, None])
            decay = tl.math.exp2(tl.fma(peak, LOG2E, 0.0) - shift)
        total = total * decay + tl.sum(p, 1)
        peak = higher
        if DROPOUT:
            p = awaited(tl.where(keep(word0[:, None], word1[:, None], start, tl.arange(0, BLOCK_N)[None, :], limit), p, 0.0))
        if WEIGHT is not None:
            if TAIL:  # past the end a quotient may be NaN
                p = tl.where(k_ok, WEIGHT(p, b, h, q[:, None], keys[None, :], q_ok, k_ok, sizes, aux), 0.0)
            else:
                p = WEIGHT(p, b, h, q[:, None], keys[None, :], q_ok, True, sizes, aux)
        v0 = stream_rows(v, v_strides, b, kv_head, start, M, 0, V0, DV, BLOCK_N, TAIL, TMA)
        p = p.to(v0.dtype)
        acc0 = dot(p, v0, acc0 * decay[:, None], PRECISION)
        if V1 > 0:
            v1 = stream_rows(v, v_strides, b, kv_head, start, M, V0, V1, DV, BLOCK_N, TAIL, TMA)
            acc1 = dot(p, v1, acc1 * decay[:, None], PRECISION)
    return acc0, acc1, peak, total


@triton.jit
def _tiles(
    q0, q1, k, v, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux, word0, word1, limit,
    first, last, full_first, full_last, floor, revisit,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr, FULL_SCORE: tl.constexpr, FULL_FACTOR: tl.constexpr,
    FULL_WIDE: tl.constexpr, TRY: tl.constexpr, ONE: tl.constexpr, REVISIT: tl.constexpr, INF_ROWS: tl.constexpr,
    WEIGHT: tl.constexpr, EVEN_M: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(acc0, acc1, peak, total) of the key tiles that some row here needs; ONE: all tiles are whole, and one loop takes them.

    TRY: not wide, for rows whose peak is inside (-NARROW, NARROW]; where it is not, it comes out at an end or outside, and what
    else comes out is nothing. (A peak on the way there that is lower counts as -NARROW: its terms keep their right weight.)
    """
    N = sizes[2]
    M = sizes[3]
    rows = q_start + tl.arange(0, BLOCK_M)
    acc0 = tl.zeros((BLOCK_M, V0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, V1 if V1 > 0 else 1), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc0, acc1, peak, total = _loop(
        acc0, acc1, peak, total, q0, q1, k, v, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux,
        word0, word1, limit, full_first, 0, 0, full_last - full_first, FULL_SCORE, FULL_FACTOR, FULL_WIDE, TRY, INF_ROWS, WEIGHT,
        False, DROPOUT, D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
    )  # fmt: skip
    if not ONE:
        cut = full_first - first
        jump = full_last - full_first
        count = last - first - jump
        passes = 1
        if REVISIT:
            passes = 2
        for step in range(passes):
            if REVISIT:
                if step == 1:  # the tiles outside [first, last), if some row needs them
                    needs = tl.max(tl.where((rows < N) & ~((peak > revisit) | (floor > revisit)), 1, 0), 0)
                    cut = first
                    jump = last - first
                    count = tl.where(needs > 0, tl.cdiv(M, BLOCK_N) - jump, 0)
                    first = 0
            acc0, acc1, peak, total = _loop(
                acc0, acc1, peak, total, q0, q1, k, v, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux,
                word0, word1, limit, first, cut, jump, count, SCORE, FACTOR, WIDE, TRY, INF_ROWS, WEIGHT,
                not EVEN_M, DROPOUT, D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
            )  # fmt: skip
    return acc0, acc1, peak, total


@triton.jit
def _nans(b, h, rows, sizes, aux, count, WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 for each row of which the weight lets some NaN through, (BLOCK_M,), had it NaNs alone; looks at `count` key tiles."""
    found = tl.zeros((BLOCK_M,), tl.int32)
    q_ok = (rows < sizes[2])[:, None]
    for i in tl.range(0, count):
        keys = (i * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        k_ok = keys < sizes[3]
        nothing = tl.full((BLOCK_M, BLOCK_N), float("nan"), tl.float32)
        p = WEIGHT(nothing, b, h, rows[:, None], keys, q_ok, k_ok, sizes, aux)
        found = tl.maximum(found, tl.max(tl.where(k_ok & (p != p), 1, 0), 1))
    return found


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "limit", "scale", "revisit"])
def forward_tiles(
    q, k, v, out, lse, seed, aux, q_strides, k_strides, v_strides, out_strides, B, H, N, M, group, limit, scale, revisit,
    BOUNDS: tl.constexpr, SCORE: tl.constexpr, FACTOR: tl.constexpr, WIDE: tl.constexpr,
    FULL_SCORE: tl.constexpr, FULL_FACTOR: tl.constexpr, FULL_WIDE: tl.constexpr,
    REVISIT: tl.constexpr, SINK: tl.constexpr, ZERO_ROWS: tl.constexpr, INF_ROWS: tl.constexpr, WEIGHT: tl.constexpr,
    SELECTS: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    q_strides = (q_strides[0] * ALIGN, q_strides[1] * ALIGN, q_strides[2] * ALIGN, q_strides[3])
    k_strides = (k_strides[0] * ALIGN, k_strides[1] * ALIGN, k_strides[2] * ALIGN, k_strides[3])
    v_strides = (v_strides[0] * ALIGN, v_strides[1] * ALIGN, v_strides[2] * ALIGN, v_strides[3])
    out_strides = (out_strides[0] * ALIGN, out_strides[1] * ALIGN, out_strides[2] * ALIGN, out_strides[3])
    sizes = (B, H, N, M)
    q_tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    rank = pid // TOGETHER
    q_start = (q_tiles - 1 - rank % q_tiles) * BLOCK_M  # last rows first: under a causal mask they have the most keys
    b = rank // q_tiles // H * TOGETHER + pid % TOGETHER
    h = rank // q_tiles % H
    q += tl.cast(b, tl.int64) * q_strides[0] + tl.cast(h, tl.int64) * q_strides[1]
    kv_head = h // group
    if not TMA:
        k += tl.cast(b, tl.int64) * k_strides[0] + tl.cast(kv_head, tl.int64) * k_strides[1]
        v += tl.cast(b, tl.int64) * v_strides[0] + tl.cast(kv_head, tl.int64) * v_strides[1]
    out += tl.cast(b, tl.int64) * out_strides[0] + tl.cast(h, tl.int64) * out_strides[1]
    rows = q_start + tl.arange(0, BLOCK_M)
    word0 = rows
    word1 = rows
    if DROPOUT:
        word0, word1 = row_words(tl.load(seed), b * H + h, rows)
    if EVEN_N:
        q_ok: tl.constexpr = True
    else:
        q_ok = (rows < N)[:, None]

    q0 = load_rows(q, q_start, N, q_strides[2], q_strides[3], 0, D0, D, BLOCK_M, not EVEN_N)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q, q_start, N, q_strides[2], q_strides[3], D0, D1, D, BLOCK_M, not EVEN_N)
    floor = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # a score that each row is known to have, beside those that it has met
    if SINK is not None:
        z = SINK(b, h, rows, rows < N, sizes, aux)
        if ZERO_ROWS:
            floor = z

    if BOUNDS is None:
        first = 0
        last = tl.cdiv(M, BLOCK_N)
        full_first = 0
        full_last = M // BLOCK_N
    else:
        lo, hi, full_lo, full_hi = BOUNDS(q_start, tl.minimum(q_start + BLOCK_M, N) - 1, b, h, sizes, aux)
        first, last, full_first, full_last = tile_ranges(lo, hi, full_lo, full_hi, M, BLOCK_N)

    acc0, acc1, peak, total = _tiles(
        q0, q1, k, v, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux, word0, word1, limit,
        first, last, full_first, full_last, floor, revisit, SCORE, FACTOR, WIDE and not FULL_WIDE, FULL_SCORE, FULL_FACTOR, False,
        FULL_WIDE, BOUNDS is None and EVEN_M, REVISIT, INF_ROWS, WEIGHT, EVEN_M,
        DROPOUT, D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
    )  # fmt: skip
    if FULL_WIDE:
        near = (peak > -NARROW) & (peak <= NARROW) | (peak == float("-inf")) | (rows >= N)
        if tl.min(near.to(tl.int32), 0) == 0:
            acc0, acc1, peak, total = _tiles(
                q0, q1, k, v, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux, word0, word1, limit,
                first, last, full_first, full_last, floor, revisit, SCORE, FACTOR, WIDE, FULL_SCORE, FULL_FACTOR, True,
                False, BOUNDS is None and EVEN_M, REVISIT, INF_ROWS, WEIGHT, EVEN_M,
                DROPOUT, D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
            )  # fmt: skip

    share = scale / total
    value = tl.fma(peak, LOG2E, 0.0) + tl.math.log2(total)
    if SINK is not None:
        higher = tl.maximum(peak, z)
        base = higher
        if INF_ROWS:
            base = tl.where(higher == float("inf"), 0.0, higher)
        decay = tl.math.exp2((peak - base) * LOG2E)
        if not ZERO_ROWS:
            decay = tl.where(peak == float("-inf"), float("nan"), decay)
        total = total * decay + tl.math.exp2((z - base) * LOG2E)
        share = decay * scale / total
        value = tl.fma(higher, LOG2E, 0.0) + tl.math.log2(total)
    elif ZERO_ROWS:  # lse = +inf makes 2^(x - lse) = 0 in the backward
        share = tl.where(total == 0.0, 0.0, share)
        value = tl.where(total == 0.0, float("inf"), value)
    if INF_ROWS:  # zeros where +inf is the sink's alone
        share = tl.where(total == float("inf"), tl.where(peak == float("inf"), float("nan"), 0.0), share)
    if SELECTS:  # a row of NaNs is 0 where the weight lets none of them through
        lost = (rows < N) & ~(tl.abs(share) < float("inf"))
        count = tl.where(tl.max(lost.to(tl.int32), 0) > 0, tl.cdiv(M, BLOCK_N), 0)
        through = _nans(b, h, rows, sizes, aux, count, WEIGHT, BLOCK_M, BLOCK_N)
        stopped = lost & (through == 0)
        share = tl.where(stopped, 0.0, share)
        acc0 = tl.where(stopped[:, None], 0.0, acc0)
        acc1 = tl.where(stopped[:, None], 0.0, acc1)
    store_rows(out, acc0 * share[:, None], q_start, N, out_strides[2], out_strides[3], 0, V0, DV, BLOCK_M)
    if V1 > 0:
        store_rows(out, acc1 * share[:, None], q_start, N, out_strides[2], out_strides[3], V0, V1, DV, BLOCK_M)
    tl.store(lse + tl.cast(b * H + h, tl.int64) * N + rows, value, mask=rows < N)
