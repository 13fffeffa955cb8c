"""The gradient of a captured table that is read at (.., q, k), such as a learned bias [H, N, M] that batches share.

The dq kernel has it tile by tile, and stores each tile in a slot of its program: tiles one after the other, for rows of a table
lie far apart, and a tile written there took dq three times as long. `table_sums` adds up the slots of those that share the
table: in fp32, in one order, the same result every time. There are slots for some of the query tiles (`configs.SLOTS`), so
dq goes in several launches, each with its sum: memory for a wave of programs, M long each, and not for all B H N M elements.

`table_tiles` is for what has no slots, because too many share the table or the program has two: every tile belongs to one
program, which goes over the batches and heads and computes the scores again. It is bound by the cache.
"""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from .backward_rows import load_numbers
from .device import LOG2E, any_flag, dot_pair, load_rows, probability, tile_ranges
from .dropout import keep

__all__ = ["shared_tile", "table_sums", "table_tiles"]


@triton.jit
def shared_tile(rank, pid, B, H, N, ALL_B: tl.constexpr, ALL_H: tl.constexpr, BLOCK_M: tl.constexpr):
    """(first query, batch, head) of a program: those that share a table's tile are neighbours, the last queries come first.

    rank: the number of the launch's first tile, counted over the table's own batches and heads.
    """
    q_tiles = tl.cdiv(N, BLOCK_M)
    members = 1
    if ALL_H:
        members = H
    if ALL_B:
        members *= B
    rank += pid // members
    member = pid % members
    own = rank // q_tiles
    b = own
    h = own
    if ALL_B and ALL_H:
        b = member // H
        h = member % H
    elif ALL_B:
        b = member
    elif ALL_H:
        h = member
    else:
        b = own // H
        h = own % H
    return (q_tiles - 1 - rank % q_tiles) * BLOCK_M, b, h


@triton.jit(do_not_specialize=["B", "H", "N", "M", "rank"])
def table_sums(
    slots, flags, aux, table, rank, table_strides, offset, B, H, N, M,
    BOUNDS: tl.constexpr, ALL_B: tl.constexpr, ALL_H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """table[b?, h?, q, k] = the sum of the slots of those that share it; slots: (programs of dq, M / BLOCK_N, BLOCK_M, BLOCK_N).

    A program has ROWS rows of a tile. BLOCK_M, BLOCK_N: as in dq, which writes no tile that is masked as a whole.
    """
    k_tiles = tl.cdiv(M, BLOCK_N)
    pid = tl.program_id(0)
    row = pid % (BLOCK_M // ROWS) * ROWS  # of the tile
    k_tile = pid // (BLOCK_M // ROWS) % k_tiles
    members = 1
    if ALL_H:
        members = H
    if ALL_B:
        members *= B
    first = pid // (BLOCK_M // ROWS) // k_tiles * members  # of the programs of this tile
    q_start, b, h = shared_tile(rank, first, B, H, N, ALL_B, ALL_H, BLOCK_M)
    place = table + tl.cast(offset, tl.int64)
    if not ALL_B:
        place += tl.cast(b, tl.int64) * table_strides[0]
    if not ALL_H:
        place += tl.cast(h, tl.int64) * table_strides[1]
    within = tl.arange(0, ROWS)
    across = tl.arange(0, BLOCK_N)
    part = slots + row * BLOCK_N + within[:, None] * BLOCK_N + across[None, :]  # (ROWS, BLOCK_N)
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for i in tl.range(0, members, loop_unroll_factor=4):
        live = True
        if BOUNDS is not None:
            q_start, b, h = shared_tile(rank, first + i, B, H, N, ALL_B, ALL_H, BLOCK_M)
            lo, hi, full_lo, full_hi = BOUNDS(q_start, tl.minimum(q_start + BLOCK_M, N) - 1, b, h, (B, H, N, M), aux)
            begin, end, _, _ = tile_ranges(lo, hi, full_lo, full_hi, M, BLOCK_N)
            every = any_flag(flags, b * H + h, q_start, q_start + BLOCK_M, N)
            live = ((k_tile >= begin) & (k_tile < end)) | every
        if live:
            total += tl.load(part + (tl.cast(first + i, tl.int64) * k_tiles + k_tile) * (BLOCK_M * BLOCK_N)).to(tl.float32)
    rows = q_start + row + within
    keys = k_tile * BLOCK_N + across
    place += tl.cast(rows, tl.int64)[:, None] * table_strides[2] + tl.cast(keys, tl.int64)[None, :] * table_strides[3]
    tl.store(place, total, mask=(rows < N)[:, None] & (keys < M)[None, :])


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "limit", "scale", "offset"])
def table_tiles(
    q, k, v, do, base, numbers, flags, aux, table,
    q_strides, k_strides, v_strides, do_strides, table_strides, offset, B, H, N, M, group, limit, scale,
    BOUNDS: tl.constexpr, SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, GRADIENT: tl.constexpr,
    ALL_B: tl.constexpr, ALL_H: tl.constexpr, DWEIGHT: tl.constexpr, DROPOUT: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """table[b?, h?, q, k] = the load's gradient, summed over the batches (ALL_B) and heads (ALL_H) that share the table."""
    q_tiles = tl.cdiv(N, BLOCK_M)
    k_tiles = tl.cdiv(M, BLOCK_N)
    pid = tl.program_id(0)
    q_tile = pid % q_tiles
    k_tile = pid // q_tiles % k_tiles
    own = pid // q_tiles // k_tiles  # which of the table's own batches and heads
    q_start = q_tile * BLOCK_M
    k_start = k_tile * BLOCK_N
    rows = q_start + tl.arange(0, BLOCK_M)
    keys = k_start + tl.arange(0, BLOCK_N)
    q_ok = (rows < N)[:, None]
    k_ok = (keys < M)[None, :]
    shared_heads = 1
    if ALL_H:
        shared_heads = H
    count = shared_heads
    if ALL_B:
        count = shared_heads * B
    own_heads = 1
    if not ALL_H:
        own_heads = H
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.range(0, count):
        b = own // own_heads
        if ALL_B:
            b = i // shared_heads
        h = own % own_heads
        if ALL_H:
            h = i % shared_heads
        live = True
        if BOUNDS is not None:
            lo, hi, full_lo, full_hi = BOUNDS(q_start, tl.minimum(q_start + BLOCK_M, N) - 1, b, h, (B, H, N, M), aux)
            first, last, _, _ = tile_ranges(lo, hi, full_lo, full_hi, M, BLOCK_N)
            every = any_flag(flags, b * H + h, q_start, q_start + BLOCK_M, N)
            live = ((k_tile >= first) & (k_tile < last)) | every
        if live:
            batch = tl.cast(b, tl.int64) * ALIGN
            head = tl.cast(h, tl.int64) * ALIGN
            kv_head = tl.cast(h // group, tl.int64) * ALIGN
            qh = q + batch * q_strides[0] + head * q_strides[1]
            gh = do + batch * do_strides[0] + head * do_strides[1]
            kh = k + batch * k_strides[0] + kv_head * k_strides[1]
            vh = v + batch * v_strides[0] + kv_head * v_strides[1]
            q0 = load_rows(qh, q_start, N, q_strides[2] * ALIGN, q_strides[3], 0, D0, D, BLOCK_M, True)
            k0 = load_rows(kh, k_start, M, k_strides[2] * ALIGN, k_strides[3], 0, D0, D, BLOCK_N, True)
            g0 = load_rows(gh, q_start, N, do_strides[2] * ALIGN, do_strides[3], 0, V0, DV, BLOCK_M, True)
            v0 = load_rows(vh, k_start, M, v_strides[2] * ALIGN, v_strides[3], 0, V0, DV, BLOCK_N, True)
            q1 = q0
            k1 = k0
            g1 = g0
            v1 = v0
            if D1 > 0:
                q1 = load_rows(qh, q_start, N, q_strides[2] * ALIGN, q_strides[3], D0, D1, D, BLOCK_M, True)
                k1 = load_rows(kh, k_start, M, k_strides[2] * ALIGN, k_strides[3], D0, D1, D, BLOCK_N, True)
            if V1 > 0:
                g1 = load_rows(gh, q_start, N, do_strides[2] * ALIGN, do_strides[3], V0, V1, DV, BLOCK_M, True)
                v1 = load_rows(vh, k_start, M, v_strides[2] * ALIGN, v_strides[3], V0, V1, DV, BLOCK_N, True)
            row = tl.cast(b * H + h, tl.int64) * N + rows
            row_base = tl.load(base + row, mask=rows < N, other=0.0)
            row_level, row_delta, word0, word1 = load_numbers(numbers + row[:, None] * 4, rows < N, True)
            s = dot_pair(q0, q1, k0, k1, D1 > 0, PRECISION)  # (BLOCK_M, BLOCK_N)
            x = SCORE(s, b, h, rows[:, None], keys[None, :], q_ok, k_ok, (B, H, N, M), aux)
            p = probability(x, row_base[:, None], row_level[:, None], FACTOR * LOG2E, DEEP)
            dp = dot_pair(g0, g1, v0, v1, V1 > 0, PRECISION)
            if DWEIGHT is not None:
                dp = DWEIGHT(p, dp, b, h, rows[:, None], keys[None, :], q_ok, k_ok, (B, H, N, M), aux)
            if DROPOUT:
                kept = keep(word0[:, None], word1[:, None], k_start, tl.arange(0, BLOCK_N)[None, :], limit)
                dp = dp * tl.where(kept, scale, 0.0)
            dx = tl.where(q_ok & k_ok, p * (dp - row_delta[:, None]), 0.0)
            total += GRADIENT(s, dx, b, h, rows[:, None], keys[None, :], q_ok, k_ok, (B, H, N, M), aux)
    place = tl.cast(offset, tl.int64) + tl.cast(own // own_heads, tl.int64) * table_strides[0]
    place += tl.cast(own % own_heads, tl.int64) * table_strides[1]
    pointers = (
        table + place + tl.cast(rows, tl.int64)[:, None] * table_strides[2] + tl.cast(keys, tl.int64)[None, :] * table_strides[3]
    )
    tl.store(pointers, total, mask=q_ok & k_ok)
