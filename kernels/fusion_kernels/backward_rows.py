"""What the backward needs of each row before it starts: sum(do * out), and where its log-sum-exp does not say enough."""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from .device import FLAG_ROWS, LOG2E, any_flag, dot_pair, load_rows, probability, tile_ranges
from .dropout import keep, row_words

__all__ = ["deep_rows", "delta_rows", "sink_rows"]


# Of a log-sum-exp as large as this, in base 2, a half of the last digit is 2^-11: as much as a probability may be off.
HIGH = tl.constexpr(8192.0)


@triton.jit
def load_numbers(rows, ok, TAIL: tl.constexpr):
    """(level, delta, word0, word1) of each row, (ROWS,) each; rows: where their numbers begin, (ROWS, 1).

    One load of four words: each of four loads of one would be made by every thread for itself, element by element. In the loop of
    `dkdv_tiles` that was 64 of 480 instructions, and 128 more to address and to guard them.
    """
    four = rows + tl.arange(0, 4)[None, :]
    if TAIL:
        packed = tl.load(four, mask=ok[:, None], other=0.0)
    else:
        packed = tl.load(four)
    even, odd = tl.split(tl.reshape(packed, (packed.shape[0], 2, 2)))
    level, word0 = tl.split(even)
    delta, word1 = tl.split(odd)
    return level, delta, word0.to(tl.uint32, bitcast=True), word1.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["B", "H", "N", "floor"])
def delta_rows(
    do, out, lse, numbers, flags, seed, do_strides, out_strides, B, H, N, floor,
    FLAG: tl.constexpr, INF_ROWS: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    DV: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """numbers[b, h, q] = (lse, sum_d do out, word0, word1): what the kernels after this one ask of each row.

    word0, word1: what decides what dropout keeps.
    flags[b, h, tile] = 1 if a row's log-sum-exp is not above `floor` (its masked keys count), else 0: see `any_flag`. With
        INF_ROWS, 1 as well where it is +inf: the gradient of every score is NaN in such a row.
    """
    BLOCK: tl.constexpr = FLAG_ROWS
    q_tiles = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    bh = pid // q_tiles
    start = pid % q_tiles * BLOCK
    b = tl.cast(bh // H, tl.int64)
    h = tl.cast(bh % H, tl.int64)
    do += b * (do_strides[0] * ALIGN) + h * (do_strides[1] * ALIGN)
    out += b * (out_strides[0] * ALIGN) + h * (out_strides[1] * ALIGN)
    g = load_rows(do, start, N, do_strides[2] * ALIGN, do_strides[3], 0, WIDTH, DV, BLOCK, True).to(tl.float32)  # (BLOCK, WIDTH)
    o = load_rows(out, start, N, out_strides[2] * ALIGN, out_strides[3], 0, WIDTH, DV, BLOCK, True).to(tl.float32)
    rows = start + tl.arange(0, BLOCK)
    row = tl.cast(bh, tl.int64) * N + rows
    known = tl.load(lse + row, mask=rows < N, other=0.0)
    total = tl.sum(g * o, 1)
    if INF_ROWS and SINK:  # a sum over the sink as well, where +inf is the sink's alone (else `out` is NaN)
        total = tl.where(known == float("inf"), float("nan"), total)
    tl.store(numbers + row * 4, known, mask=rows < N)
    tl.store(numbers + row * 4 + 1, total, mask=rows < N)
    if FLAG:
        bad = (rows < N) & ~(known > floor)
        if INF_ROWS:
            bad |= known == float("inf")
        tl.store(flags + pid, tl.max(bad.to(tl.int32), 0))
    if DROPOUT:
        word0, word1 = row_words(tl.load(seed), bh, rows)
        tl.store(numbers + row * 4 + 2, word0.to(tl.float32, bitcast=True), mask=rows < N)
        tl.store(numbers + row * 4 + 3, word1.to(tl.float32, bitcast=True), mask=rows < N)


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "limit", "scale", "floor"])
def deep_rows(
    q, k, v, do, lse, base, numbers, flags, aux, q_strides, k_strides, v_strides, do_strides,
    B, H, N, M, group, limit, scale, floor,
    BOUNDS: tl.constexpr, SCORE: tl.constexpr, FACTOR: tl.constexpr, DWEIGHT: tl.constexpr, SINK: tl.constexpr,
    EXACT: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows with lse between `floor` and HIGH: base = 0, level = lse. The others: base = max x, level = log2 sum 2^(x - base).

    The level takes the place of lse in `numbers`. EXACT: every row is of the others, and its delta is sum_k p dp. Where a row is
    almost all one key's, dp - delta is 0 but for roundings, which are the same in dp and in this sum, and not in sum_d do out.
    """
    q_tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    start = pid % q_tiles * BLOCK_M
    b = pid // q_tiles // H
    h = pid // q_tiles % H
    sizes = (B, H, N, M)
    q += tl.cast(b, tl.int64) * (q_strides[0] * ALIGN) + tl.cast(h, tl.int64) * (q_strides[1] * ALIGN)
    k += tl.cast(b, tl.int64) * (k_strides[0] * ALIGN) + tl.cast(h // group, tl.int64) * (k_strides[1] * ALIGN)
    rows = start + tl.arange(0, BLOCK_M)
    row = tl.cast(b * H + h, tl.int64) * N + rows
    q_ok = (rows < N)[:, None]
    known = tl.load(lse + row, mask=rows < N, other=0.0)
    deep = rows < N
    if not EXACT:
        deep &= ~((known > floor) & (known < HIGH))
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    part = tl.zeros((BLOCK_M,), tl.float32)  # of the sum of p dp
    first = 0
    last = tl.cdiv(M, BLOCK_N)
    if BOUNDS is not None:
        lo, hi, full_lo, full_hi = BOUNDS(start, tl.minimum(start + BLOCK_M, N) - 1, b, h, sizes, aux)
        first, last, _, _ = tile_ranges(lo, hi, full_lo, full_hi, M, BLOCK_N)
        every = any_flag(flags, b * H + h, start, start + BLOCK_M, N)  # some row here gives its masked keys a share
        first = tl.where(every, 0, first)
        last = tl.where(every, tl.cdiv(M, BLOCK_N), last)
    last = tl.where(tl.max(deep.to(tl.int32), 0) > 0, last, first)
    q0 = load_rows(q, start, N, q_strides[2] * ALIGN, q_strides[3], 0, D0, D, BLOCK_M, True)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q, start, N, q_strides[2] * ALIGN, q_strides[3], D0, D1, D, BLOCK_M, True)
    if EXACT:
        v += tl.cast(b, tl.int64) * (v_strides[0] * ALIGN) + tl.cast(h // group, tl.int64) * (v_strides[1] * ALIGN)
        do += tl.cast(b, tl.int64) * (do_strides[0] * ALIGN) + tl.cast(h, tl.int64) * (do_strides[1] * ALIGN)
        do0 = load_rows(do, start, N, do_strides[2] * ALIGN, do_strides[3], 0, V0, DV, BLOCK_M, True)
        do1 = do0
        if V1 > 0:
            do1 = load_rows(do, start, N, do_strides[2] * ALIGN, do_strides[3], V0, V1, DV, BLOCK_M, True)
        _, _, word0, word1 = load_numbers(numbers + row[:, None] * 4, rows < N, True)
    for i in tl.range(first, last):
        keys = (i * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        k0 = load_rows(k, i * BLOCK_N, M, k_strides[2] * ALIGN, k_strides[3], 0, D0, D, BLOCK_N, True)
        k1 = k0
        if D1 > 0:
            k1 = load_rows(k, i * BLOCK_N, M, k_strides[2] * ALIGN, k_strides[3], D0, D1, D, BLOCK_N, True)
        s = dot_pair(q0, q1, k0, k1, D1 > 0, PRECISION)  # (BLOCK_M, BLOCK_N)
        k_ok = keys < M
        x = SCORE(s, b, h, rows[:, None], keys, q_ok, k_ok, sizes, aux)
        x = tl.where(k_ok, x, float("-inf"))
        higher = tl.maximum(peak, tl.max(x, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.math.exp2((x - finite[:, None]) * (FACTOR * LOG2E))
        decay = tl.math.exp2((peak - finite) * (FACTOR * LOG2E))
        total = total * decay + tl.sum(p, 1)
        if EXACT:
            v0 = load_rows(v, i * BLOCK_N, M, v_strides[2] * ALIGN, v_strides[3], 0, V0, DV, BLOCK_N, True)
            v1 = v0
            if V1 > 0:
                v1 = load_rows(v, i * BLOCK_N, M, v_strides[2] * ALIGN, v_strides[3], V0, V1, DV, BLOCK_N, True)
            dp = dot_pair(do0, do1, v0, v1, V1 > 0, PRECISION)
            if DWEIGHT is not None:
                dp = DWEIGHT(p, dp, b, h, rows[:, None], keys, q_ok, k_ok, sizes, aux)
            if DROPOUT:
                kept = keep(word0[:, None], word1[:, None], i * BLOCK_N, tl.arange(0, BLOCK_N)[None, :], limit)
                dp = dp * tl.where(kept, scale, 0.0)
            part = part * decay + tl.sum(tl.where(k_ok, p * dp, 0.0), 1)
        peak = higher
    if SINK is not None:
        z = SINK(b, h, rows, rows < N, sizes, aux) / FACTOR
        higher = tl.maximum(peak, z)
        decay = tl.math.exp2((peak - higher) * (FACTOR * LOG2E))
        total = total * decay + tl.math.exp2((z - higher) * (FACTOR * LOG2E))
        part = part * decay
        peak = higher
        deep &= known == known  # the forward knows which rows are NaN
    deep &= (known < float("inf")) | (peak > float("-inf"))  # lse = +inf of a row without a key is meant: it gives zeros
    deep &= peak < float("inf")  # and so is that of a row with +inf
    tl.store(base + row, tl.where(deep, peak, 0.0), mask=rows < N)
    tl.store(numbers + row * 4, tl.where(deep, tl.math.log2(total), known), mask=rows < N)
    if EXACT:
        tl.store(numbers + row * 4 + 1, part / total, mask=deep)


@triton.jit(do_not_specialize=["B", "H", "N", "M"])
def sink_rows(
    base, numbers, aux, daux, B, H, N, M,
    SINK: tl.constexpr, CAPTURES: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of the sink's score, dz = -p_sink delta, to the gradients of what the sink reads."""
    q_tiles = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    start = pid % q_tiles * BLOCK
    b = pid // q_tiles // H
    h = pid // q_tiles % H
    sizes = (B, H, N, M)
    rows = start + tl.arange(0, BLOCK)
    row = tl.cast(b * H + h, tl.int64) * N + rows
    q_ok = rows < N
    row_base = tl.load(base + row, mask=q_ok, other=0.0)
    row_level, row_delta, _, _ = load_numbers(numbers + row[:, None] * 4, q_ok, True)
    z = SINK(b, h, rows, q_ok, sizes, aux) / FACTOR
    dz = -probability(z, row_base, row_level, FACTOR * LOG2E, DEEP) * row_delta
    CAPTURES(dz, b, h, rows, q_ok, sizes, aux, daux)
