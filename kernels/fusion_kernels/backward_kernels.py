"""The two kernels of the backward that carry its arithmetic: dk and dv by key tile, dq by query tile. See `backward`."""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from .backward_rows import load_numbers
from .backward_table import shared_tile
from .device import LOG2E, any_flag, awaited, dot, dot_pair, load_rows, probability, store_rows, stream_rows, tile_ranges, visited
from .dropout import keep

__all__ = ["dkdv_tiles", "dq_tiles"]


@triton.jit
def _dkdv_loop(
    dk0, dk1, dv0, dv1,  # (BLOCK_N, D0), (BLOCK_N, D1), (BLOCK_N, V0), (BLOCK_N, V1)
    k0, k1, v0, v1, q, do, base, numbers, q_strides, do_strides, b, h, k_start, k_ok, sizes, aux, limit, scale,
    first, cut, jump, count,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr, DRATIO: tl.constexpr,
    WEIGHT: tl.constexpr, DWEIGHT: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds `count` query tiles to dk and dv of one key tile. Scores are held transposed: (BLOCK_N, BLOCK_M)."""
    N = sizes[2]
    keys = (k_start + tl.arange(0, BLOCK_N))[:, None]
    for i in tl.range(0, count):
        start = visited(i, first, cut, jump) * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        q0 = stream_rows(q, q_strides, b, h, start, N, 0, D0, D, BLOCK_M, TAIL, TMA)
        q1 = q0
        if D1 > 0:
            q1 = stream_rows(q, q_strides, b, h, start, N, D0, D1, D, BLOCK_M, TAIL, TMA)
        s = dot_pair(k0, k1, q0, q1, D1 > 0, PRECISION)  # (BLOCK_N, BLOCK_M)
        if TAIL:
            q_ok = (rows < N)[None, :]
            row_base = tl.load(base + rows, mask=rows < N, other=0.0)
        else:
            q_ok: tl.constexpr = True
            row_base = tl.load(base + rows)
        row_level, row_delta, word0, word1 = load_numbers(numbers + rows[:, None] * 4, rows < N, TAIL)
        x = SCORE(s, b, h, rows[None, :], keys, q_ok, k_ok, sizes, aux)
        p = probability(x, row_base[None, :], row_level[None, :], FACTOR * LOG2E, DEEP)
        if TAIL:
            p = tl.where(q_ok, p, 0.0)
        do0 = stream_rows(do, do_strides, b, h, start, N, 0, V0, DV, BLOCK_M, TAIL, TMA)
        do1 = do0
        if V1 > 0:
            do1 = stream_rows(do, do_strides, b, h, start, N, V0, V1, DV, BLOCK_M, TAIL, TMA)
        dropped = p
        if DROPOUT:
            share = tl.where(keep(word0[None, :], word1[None, :], k_start, tl.arange(0, BLOCK_N)[:, None], limit), scale, 0.0)
            dropped = p * share  # NaN stays NaN, as in eager
        if WEIGHT is not None:
            dropped = WEIGHT(dropped, b, h, rows[None, :], keys, q_ok, k_ok, sizes, aux)
            if TAIL:  # past the end a quotient may be NaN
                dropped = tl.where(q_ok, dropped, 0.0)
        dropped = dropped.to(do0.dtype)
        dv0 = dot(dropped, do0, dv0, PRECISION)
        if V1 > 0:
            dv1 = dot(dropped, do1, dv1, PRECISION)
        dp = dot_pair(v0, v1, do0, do1, V1 > 0, PRECISION)  # (BLOCK_N, BLOCK_M)
        if DWEIGHT is not None:
            dp = DWEIGHT(p, dp, b, h, rows[None, :], keys, q_ok, k_ok, sizes, aux)
        if DROPOUT:
            dp = dp * share
        dx = p * (dp - row_delta[None, :])
        ds = DSCORE(s, dx, b, h, rows[None, :], keys, q_ok, k_ok, sizes, aux)
        if DRATIO != 1.0:
            ds = ds * DRATIO
        if TAIL:  # past the end 0 * inf may have made NaN
            ds = tl.where(q_ok, ds, 0.0)
        ds = ds.to(q0.dtype)
        dk0 = dot(ds, q0, dk0, PRECISION)
        if D1 > 0:
            dk1 = dot(ds, q1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "limit", "scale"])
def dkdv_tiles(
    q, k, v, do, dk, dv, base, numbers, flags, aux,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    B, H, N, M, group, limit, scale,
    BOUNDS: tl.constexpr, SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr,
    DRATIO: tl.constexpr, FULL_SCORE: tl.constexpr, FULL_FACTOR: tl.constexpr, FULL_DEEP: tl.constexpr,
    FULL_DSCORE: tl.constexpr, DFACTOR: tl.constexpr, WEIGHT: tl.constexpr, DWEIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    q_strides = (q_strides[0] * ALIGN, q_strides[1] * ALIGN, q_strides[2] * ALIGN, q_strides[3])
    k_strides = (k_strides[0] * ALIGN, k_strides[1] * ALIGN, k_strides[2] * ALIGN, k_strides[3])
    v_strides = (v_strides[0] * ALIGN, v_strides[1] * ALIGN, v_strides[2] * ALIGN, v_strides[3])
    do_strides = (do_strides[0] * ALIGN, do_strides[1] * ALIGN, do_strides[2] * ALIGN, do_strides[3])
    sizes = (B, H, N, M)
    k_tiles = tl.cdiv(M, BLOCK_N)
    pid = tl.program_id(0)
    rank = pid // TOGETHER
    k_start = rank % k_tiles * BLOCK_N  # first keys first: under a causal mask they have the most queries
    kv_heads = H // group
    b = rank // k_tiles // kv_heads * TOGETHER + pid % TOGETHER
    kv_head = rank // k_tiles % kv_heads
    batch = tl.cast(b, tl.int64)
    head = tl.cast(kv_head, tl.int64)
    k += batch * k_strides[0] + head * k_strides[1]
    v += batch * v_strides[0] + head * v_strides[1]
    dk += batch * dk_strides[0] + head * dk_strides[1]
    dv += batch * dv_strides[0] + head * dv_strides[1]
    if EVEN_M:
        k_ok: tl.constexpr = True
    else:
        k_ok = (k_start + tl.arange(0, BLOCK_N) < M)[:, None]

    k0 = load_rows(k, k_start, M, k_strides[2], k_strides[3], 0, D0, D, BLOCK_N, not EVEN_M)
    v0 = load_rows(v, k_start, M, v_strides[2], v_strides[3], 0, V0, DV, BLOCK_N, not EVEN_M)
    k1 = k0
    v1 = v0
    if D1 > 0:
        k1 = load_rows(k, k_start, M, k_strides[2], k_strides[3], D0, D1, D, BLOCK_N, not EVEN_M)
    if V1 > 0:
        v1 = load_rows(v, k_start, M, v_strides[2], v_strides[3], V0, V1, DV, BLOCK_N, not EVEN_M)
    dk0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dk1 = tl.zeros((BLOCK_N, D1 if D1 > 0 else 1), tl.float32)
    dv0 = tl.zeros((BLOCK_N, V0), tl.float32)
    dv1 = tl.zeros((BLOCK_N, V1 if V1 > 0 else 1), tl.float32)

    for g in range(group):
        h = kv_head * group + g
        row = (batch * H + h) * N
        q_head = q
        do_head = do
        if not TMA:
            q_head += batch * q_strides[0] + tl.cast(h, tl.int64) * q_strides[1]
            do_head += batch * do_strides[0] + tl.cast(h, tl.int64) * do_strides[1]
        if BOUNDS is None:
            first = 0
            last = tl.cdiv(N, BLOCK_M)
            full_first = 0
            full_last = N // BLOCK_M
        else:
            lo, hi, full_lo, full_hi = BOUNDS(k_start, tl.minimum(k_start + BLOCK_N, M) - 1, b, h, sizes, aux)
            first, last, full_first, full_last = tile_ranges(lo, hi, full_lo, full_hi, N, BLOCK_M)
            every = any_flag(flags, b * H + h, 0, N, N)  # some row of this head gives its masked keys a share
            first = tl.where(every, 0, first)
            last = tl.where(every, tl.cdiv(N, BLOCK_M), last)
            full_first = tl.where(every, 0, full_first)
            full_last = tl.where(every, 0, full_last)
        dk0, dk1, dv0, dv1 = _dkdv_loop(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, do_head, base + row, numbers + row * 4,
            q_strides, do_strides, b, h, k_start, k_ok, sizes, aux, limit, scale, full_first, 0, 0, full_last - full_first,
            FULL_SCORE, FULL_FACTOR, FULL_DEEP, FULL_DSCORE, 1.0, WEIGHT, DWEIGHT, False, DROPOUT,
            D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
        if not (BOUNDS is None and EVEN_N):
            jump = full_last - full_first
            dk0, dk1, dv0, dv1 = _dkdv_loop(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, do_head, base + row, numbers + row * 4,
                q_strides, do_strides, b, h, k_start, k_ok, sizes, aux, limit, scale,
                first, full_first - first, jump, last - first - jump,
                SCORE, FACTOR, DEEP, DSCORE, DRATIO, WEIGHT, DWEIGHT, not EVEN_N, DROPOUT,
                D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
            )  # fmt: skip

    store_rows(dk, dk0 * DFACTOR, k_start, M, dk_strides[2], dk_strides[3], 0, D0, D, BLOCK_N)
    store_rows(dv, dv0, k_start, M, dv_strides[2], dv_strides[3], 0, V0, DV, BLOCK_N)
    if D1 > 0:
        store_rows(dk, dk1 * DFACTOR, k_start, M, dk_strides[2], dk_strides[3], D0, D1, D, BLOCK_N)
    if V1 > 0:
        store_rows(dv, dv1, k_start, M, dv_strides[2], dv_strides[3], V0, V1, DV, BLOCK_N)


@triton.jit
def _dq_loop(
    dq0, dq1,  # (BLOCK_M, D0), (BLOCK_M, D1)
    q0, q1, do0, do1, k, v, row_base, row_level, row_delta, word0, word1, k_strides, v_strides, b, h, kv_head, q_start, q_ok,
    sizes, aux, daux, slot, limit, scale, first, cut, jump, count,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr, DRATIO: tl.constexpr,
    CAPTURES: tl.constexpr, GRADIENT: tl.constexpr, DWEIGHT: tl.constexpr, WEIGHT_CAPTURES: tl.constexpr,
    TAIL: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds `count` key tiles to dq of one query tile, and to the gradients of captured tensors.

    slot: takes a table's gradient, tile by tile: (M / BLOCK_N, BLOCK_M, BLOCK_N), each tile as it is, past the ends too.
    """
    N = sizes[2]
    M = sizes[3]
    rows = (q_start + tl.arange(0, BLOCK_M))[:, None]
    for i in tl.range(0, count):
        start = visited(i, first, cut, jump) * BLOCK_N
        keys = (start + tl.arange(0, BLOCK_N))[None, :]
        k0 = stream_rows(k, k_strides, b, kv_head, start, M, 0, D0, D, BLOCK_N, TAIL, TMA)
        v0 = stream_rows(v, v_strides, b, kv_head, start, M, 0, V0, DV, BLOCK_N, TAIL, TMA)
        k1 = k0
        v1 = v0
        if D1 > 0:
            k1 = stream_rows(k, k_strides, b, kv_head, start, M, D0, D1, D, BLOCK_N, TAIL, TMA)
        if V1 > 0:
            v1 = stream_rows(v, v_strides, b, kv_head, start, M, V0, V1, DV, BLOCK_N, TAIL, TMA)
        s = dot_pair(q0, q1, k0, k1, D1 > 0, PRECISION)  # (BLOCK_M, BLOCK_N)
        if TAIL:
            k_ok = keys < M
        else:
            k_ok: tl.constexpr = True
        x = SCORE(s, b, h, rows, keys, q_ok, k_ok, sizes, aux)
        p = probability(x, row_base[:, None], row_level[:, None], FACTOR * LOG2E, DEEP)
        dp = dot_pair(do0, do1, v0, v1, V1 > 0, PRECISION)
        dropped = p
        if DROPOUT:
            share = tl.where(keep(word0[:, None], word1[:, None], start, tl.arange(0, BLOCK_N)[None, :], limit), scale, 0.0)
            dropped = p * share
        if WEIGHT_CAPTURES is not None:
            WEIGHT_CAPTURES(dropped, dp, b, h, rows, keys, rows < N, keys < M, sizes, aux, daux)
        if DWEIGHT is not None:
            dp = DWEIGHT(p, dp, b, h, rows, keys, q_ok, k_ok, sizes, aux)
        if DROPOUT:
            dp = dp * share
        dx = p * (dp - row_delta[:, None])
        if TAIL:
            dx = tl.where(k_ok, dx, 0.0)
        if CAPTURES is not None:
            CAPTURES(s, dx, b, h, rows, keys, rows < N, keys < M, sizes, aux, daux)
        if GRADIENT is not None:
            part = GRADIENT(s, dx, b, h, rows, keys, q_ok, k_ok, sizes, aux)
            at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (BLOCK_M, BLOCK_N)
            tl.store(slot + tl.cast(start, tl.int64) * BLOCK_M + at, part.to(slot.dtype.element_ty))
        ds = DSCORE(s, dx, b, h, rows, keys, q_ok, k_ok, sizes, aux)
        if DRATIO != 1.0:
            ds = ds * DRATIO
        if TAIL:
            ds = tl.where(k_ok, ds, 0.0)
        ds = ds.to(k0.dtype)
        dq0 = dot(ds, k0, dq0, PRECISION)
        if D1 > 0:
            dq1 = dot(ds, k1, dq1, PRECISION)
        if GRADIENT is not None:
            dq0 = awaited(dq0)
            if D1 > 0:
                dq1 = awaited(dq1)
    return dq0, dq1


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "limit", "scale", "rank"])
def dq_tiles(
    q, k, v, do, dq, base, numbers, flags, aux, daux, slots, rank,
    q_strides, k_strides, v_strides, do_strides, dq_strides, B, H, N, M, group, limit, scale,
    BOUNDS: tl.constexpr, SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr,
    DRATIO: tl.constexpr, CAPTURES: tl.constexpr, FULL_SCORE: tl.constexpr, FULL_FACTOR: tl.constexpr,
    FULL_DEEP: tl.constexpr, FULL_DSCORE: tl.constexpr, FULL_CAPTURES: tl.constexpr, DFACTOR: tl.constexpr,
    GRADIENT: tl.constexpr, FULL_GRADIENT: tl.constexpr, ALL_B: tl.constexpr, ALL_H: tl.constexpr,
    DWEIGHT: tl.constexpr, WEIGHT_CAPTURES: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """slots: one for each program, if there is a GRADIENT; `rank` is then the first of the tiles of this launch."""
    q_strides = (q_strides[0] * ALIGN, q_strides[1] * ALIGN, q_strides[2] * ALIGN, q_strides[3])
    k_strides = (k_strides[0] * ALIGN, k_strides[1] * ALIGN, k_strides[2] * ALIGN, k_strides[3])
    v_strides = (v_strides[0] * ALIGN, v_strides[1] * ALIGN, v_strides[2] * ALIGN, v_strides[3])
    do_strides = (do_strides[0] * ALIGN, do_strides[1] * ALIGN, do_strides[2] * ALIGN, do_strides[3])
    sizes = (B, H, N, M)
    pid = tl.program_id(0)
    slot = slots
    if GRADIENT is not None:
        q_start, b, h = shared_tile(rank, pid, B, H, N, ALL_B, ALL_H, BLOCK_M)
        slot += tl.cast(pid, tl.int64) * (tl.cdiv(M, BLOCK_N) * BLOCK_N * BLOCK_M)
    else:
        q_tiles = tl.cdiv(N, BLOCK_M)
        rank = pid // TOGETHER
        q_start = (q_tiles - 1 - rank % q_tiles) * BLOCK_M
        b = rank // q_tiles // H * TOGETHER + pid % TOGETHER
        h = rank // q_tiles % H
    batch = tl.cast(b, tl.int64)
    head = tl.cast(h, tl.int64)
    kv_head = h // group
    q += batch * q_strides[0] + head * q_strides[1]
    do += batch * do_strides[0] + head * do_strides[1]
    dq += batch * dq_strides[0] + head * dq_strides[1]
    if not TMA:
        k += batch * k_strides[0] + tl.cast(kv_head, tl.int64) * k_strides[1]
        v += batch * v_strides[0] + tl.cast(kv_head, tl.int64) * v_strides[1]
    rows = q_start + tl.arange(0, BLOCK_M)
    if EVEN_N:
        q_ok: tl.constexpr = True
    else:
        q_ok = (rows < N)[:, None]
    row = (batch * H + h) * N + rows
    row_base = tl.load(base + row, mask=rows < N, other=0.0)
    row_level, row_delta, word0, word1 = load_numbers(numbers + row[:, None] * 4, rows < N, True)

    q0 = load_rows(q, q_start, N, q_strides[2], q_strides[3], 0, D0, D, BLOCK_M, not EVEN_N)
    do0 = load_rows(do, q_start, N, do_strides[2], do_strides[3], 0, V0, DV, BLOCK_M, not EVEN_N)
    q1 = q0
    do1 = do0
    if D1 > 0:
        q1 = load_rows(q, q_start, N, q_strides[2], q_strides[3], D0, D1, D, BLOCK_M, not EVEN_N)
    if V1 > 0:
        do1 = load_rows(do, q_start, N, do_strides[2], do_strides[3], V0, V1, DV, BLOCK_M, not EVEN_N)
    dq0 = tl.zeros((BLOCK_M, D0), tl.float32)
    dq1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 1), tl.float32)

    if BOUNDS is None:
        first = 0
        last = tl.cdiv(M, BLOCK_N)
        full_first = 0
        full_last = M // BLOCK_N
    else:
        lo, hi, full_lo, full_hi = BOUNDS(q_start, tl.minimum(q_start + BLOCK_M, N) - 1, b, h, sizes, aux)
        first, last, full_first, full_last = tile_ranges(lo, hi, full_lo, full_hi, M, BLOCK_N)
        every = any_flag(flags, b * H + h, q_start, q_start + BLOCK_M, N)  # some row here gives its masked keys a share
        first = tl.where(every, 0, first)
        last = tl.where(every, tl.cdiv(M, BLOCK_N), last)
        full_first = tl.where(every, 0, full_first)
        full_last = tl.where(every, 0, full_last)
    dq0, dq1 = _dq_loop(
        dq0, dq1, q0, q1, do0, do1, k, v, row_base, row_level, row_delta, word0, word1, k_strides, v_strides,
        b, h, kv_head, q_start, q_ok, sizes, aux, daux, slot, limit, scale,
        full_first, 0, 0, full_last - full_first,
        FULL_SCORE, FULL_FACTOR, FULL_DEEP, FULL_DSCORE, 1.0, FULL_CAPTURES, FULL_GRADIENT, DWEIGHT,
        WEIGHT_CAPTURES, False, DROPOUT,
        D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
    )  # fmt: skip
    if not (BOUNDS is None and EVEN_M):
        jump = full_last - full_first
        dq0, dq1 = _dq_loop(
            dq0, dq1, q0, q1, do0, do1, k, v, row_base, row_level, row_delta, word0, word1, k_strides, v_strides,
            b, h, kv_head, q_start, q_ok, sizes, aux, daux, slot, limit, scale,
            first, full_first - first, jump, last - first - jump,
            SCORE, FACTOR, DEEP, DSCORE, DRATIO, CAPTURES, GRADIENT, DWEIGHT, WEIGHT_CAPTURES, not EVEN_M, DROPOUT,
            D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
    store_rows(dq, dq0 * DFACTOR, q_start, N, dq_strides[2], dq_strides[3], 0, D0, D, BLOCK_M)
    if D1 > 0:
        store_rows(dq, dq1 * DFACTOR, q_start, N, dq_strides[2], dq_strides[3], D0, D1, D, BLOCK_M)
