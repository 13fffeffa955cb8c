"""The attention backward in portable Triton: nothing N x M is kept, the probabilities are recomputed from the log-sum-exp.

With x = program(s), p = softmax(x), o = dropout(p) @ v, and D[q] = sum_d do[q, d] o[q, d]:
    dv = dropout(p)^T @ do
    dp = dropout'(do @ v^T)
    dx = p * (dp - D)                D is also sum_k p dp, because o is dropout(p) @ v
    ds = program'(s, dx)             the derivative of the program, one more generated function
    dq = ds @ k,   dk = ds^T @ q
Three kernels: D (and a flag a head, see `_delta`), then dk and dv with one program a tile of keys, which loops over the
queries of every head in the group, then dq with one program a tile of queries. No atomics, so the result is the same every
time; the gradients of captured tensors are gathered in the dq kernel, where the tile holds d(loss)/d(x).

p = 2^(x * log2(e) - lse). Where a row can have only masked scores of a finite fill, say -1e9, its log-sum-exp in fp32 has no
digits left for the sum over its keys: `_deep_rows` finds the maximum and the sum of such rows again, and keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import codegen, configs
from .device import LOG2E, dot, dot_pair, load_rows, probability, store_rows, stream_rows, tile_ranges, visited
from .dropout import keep_scale, keep_tile, threshold
from .forward import check, describable, describe, parts, precision, split, strides
from .program import Program

__all__ = ["attention_backward"]


@triton.jit(do_not_specialize=["H", "N", "floor"])
def _delta(
    do, out, lse, delta, flags, do_strides, out_strides, H, N, floor,
    FLAG: tl.constexpr, ALIGN: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta[b, h, q] = sum_d do out; flags[b, h] = 1 if a row's log-sum-exp is not above `floor` (its masked keys count)."""
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
    tl.store(delta + row, tl.sum(g * o, 1), mask=rows < N)
    if FLAG:
        bad = (rows < N) & ~(tl.load(lse + row, mask=rows < N, other=0.0) > floor)
        if tl.max(bad.to(tl.int32), 0) > 0:
            tl.store(flags + bh, 1)


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "floor"])
def _deep_rows(
    q, k, lse, base, level, aux, q_strides, k_strides, B, H, N, M, group, floor,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, ALIGN: tl.constexpr, D: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows with lse above `floor`: base = 0, level = lse. The others are looked at again: base = max x, level = log2 sum 2^(x - base)."""
    q_tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    start = pid % q_tiles * BLOCK_M
    b = pid // q_tiles // H
    h = pid // q_tiles % H
    q += tl.cast(b, tl.int64) * (q_strides[0] * ALIGN) + tl.cast(h, tl.int64) * (q_strides[1] * ALIGN)
    k += tl.cast(b, tl.int64) * (k_strides[0] * ALIGN) + tl.cast(h // group, tl.int64) * (k_strides[1] * ALIGN)
    rows = start + tl.arange(0, BLOCK_M)
    row = tl.cast(b * H + h, tl.int64) * N + rows
    known = tl.load(lse + row, mask=rows < N, other=0.0)
    deep = (rows < N) & ~(known > floor)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    count = tl.where(tl.max(deep.to(tl.int32), 0) > 0, tl.cdiv(M, BLOCK_N), 0)
    q0 = load_rows(q, start, N, q_strides[2] * ALIGN, q_strides[3], 0, D0, D, BLOCK_M, True)
    q1 = q0
    if D1 > 0:
        q1 = load_rows(q, start, N, q_strides[2] * ALIGN, q_strides[3], D0, D1, D, BLOCK_M, True)
    for i in tl.range(0, count):
        keys = i * BLOCK_N + tl.arange(0, BLOCK_N)
        k0 = load_rows(k, i * BLOCK_N, M, k_strides[2] * ALIGN, k_strides[3], 0, D0, D, BLOCK_N, True)
        k1 = k0
        if D1 > 0:
            k1 = load_rows(k, i * BLOCK_N, M, k_strides[2] * ALIGN, k_strides[3], D0, D1, D, BLOCK_N, True)
        s = dot_pair(q0, q1, k0, k1, D1 > 0, PRECISION)  # (BLOCK_M, BLOCK_N)
        k_ok = (keys < M)[None, :]
        x = SCORE(s, b, h, rows[:, None], keys[None, :], (rows < N)[:, None], k_ok, (B, H, N, M), aux)
        x = tl.where(k_ok, x, float("-inf"))
        higher = tl.maximum(peak, tl.max(x, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.math.exp2((x - finite[:, None]) * (FACTOR * LOG2E))
        total = total * tl.math.exp2((peak - finite) * (FACTOR * LOG2E)) + tl.sum(p, 1)
        peak = higher
    tl.store(base + row, tl.where(deep, peak, 0.0), mask=rows < N)
    tl.store(level + row, tl.where(deep, tl.math.log2(total), known), mask=rows < N)


@triton.jit
def _dkdv_loop(
    dk0, dk1, dv0, dv1,  # (BLOCK_N, D0), (BLOCK_N, D1), (BLOCK_N, V0), (BLOCK_N, V1)
    k0, k1, v0, v1, q, do, base, level, delta, q_strides, do_strides, b, h, k_start, k_ok, sizes, aux, seed, limit, scale,
    first, cut, jump, count,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr, DRATIO: tl.constexpr,
    TAIL: tl.constexpr, DROPOUT: tl.constexpr,
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
            row_level = tl.load(level + rows, mask=rows < N, other=0.0)
            row_delta = tl.load(delta + rows, mask=rows < N, other=0.0)
        else:
            q_ok: tl.constexpr = True
            row_base = tl.load(base + rows)
            row_level = tl.load(level + rows)
            row_delta = tl.load(delta + rows)
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
            keep = keep_tile(seed, limit, b * sizes[1] + h, start, k_start, BLOCK_M, BLOCK_N, True)
            dropped = tl.where(keep, p, 0.0)
        dropped = dropped.to(do0.dtype)
        dv0 = dot(dropped, do0, dv0, PRECISION)
        if V1 > 0:
            dv1 = dot(dropped, do1, dv1, PRECISION)
        dp = dot_pair(v0, v1, do0, do1, V1 > 0, PRECISION)  # (BLOCK_N, BLOCK_M)
        if DROPOUT:
            dp = tl.where(keep, dp * scale, 0.0)
        dx = p * (dp - row_delta[None, :])
        ds = DSCORE(s, dx, b, h, rows[None, :], keys, q_ok, k_ok, sizes, aux)
        if DRATIO != 1.0:
            ds = ds * DRATIO
        ds = ds.to(q0.dtype)
        dk0 = dot(ds, q0, dk0, PRECISION)
        if D1 > 0:
            dk1 = dot(ds, q1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "limit", "scale"])
def _dkdv(
    q, k, v, do, dk, dv, base, level, delta, flags, seed, aux, q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides,
    B, H, N, M, group, limit, scale,
    BOUNDS: tl.constexpr, SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr,
    DRATIO: tl.constexpr, FULL_SCORE: tl.constexpr, FULL_FACTOR: tl.constexpr, FULL_DEEP: tl.constexpr,
    FULL_DSCORE: tl.constexpr, DFACTOR: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    q_strides = (q_strides[0] * ALIGN, q_strides[1] * ALIGN, q_strides[2] * ALIGN, q_strides[3])
    k_strides = (k_strides[0] * ALIGN, k_strides[1] * ALIGN, k_strides[2] * ALIGN, k_strides[3])
    v_strides = (v_strides[0] * ALIGN, v_strides[1] * ALIGN, v_strides[2] * ALIGN, v_strides[3])
    do_strides = (do_strides[0] * ALIGN, do_strides[1] * ALIGN, do_strides[2] * ALIGN, do_strides[3])
    sizes = (B, H, N, M)
    k_tiles = tl.cdiv(M, BLOCK_N)
    pid = tl.program_id(0)
    k_start = pid % k_tiles * BLOCK_N  # first keys first: under a causal mask they have the most queries
    kv_heads = H // group
    b = pid // k_tiles // kv_heads
    kv_head = pid // k_tiles % kv_heads
    batch = tl.cast(b, tl.int64)
    head = tl.cast(kv_head, tl.int64)
    k += batch * k_strides[0] + head * k_strides[1]
    v += batch * v_strides[0] + head * v_strides[1]
    dk += batch * dk_strides[0] + head * dk_strides[1]
    dv += batch * dv_strides[0] + head * dv_strides[1]
    if DROPOUT:
        seed = tl.load(seed)
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
            every = tl.load(flags + b * H + h) != 0  # some row of this head gives its masked keys a share
            first = tl.where(every, 0, first)
            last = tl.where(every, tl.cdiv(N, BLOCK_M), last)
            full_first = tl.where(every, 0, full_first)
            full_last = tl.where(every, 0, full_last)
        dk0, dk1, dv0, dv1 = _dkdv_loop(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, do_head, base + row, level + row, delta + row, q_strides, do_strides,
            b, h, k_start, k_ok, sizes, aux, seed, limit, scale, full_first, 0, 0, full_last - full_first,
            FULL_SCORE, FULL_FACTOR, FULL_DEEP, FULL_DSCORE, 1.0, False, DROPOUT,
            D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
        if not (BOUNDS is None and EVEN_N):
            jump = full_last - full_first
            dk0, dk1, dv0, dv1 = _dkdv_loop(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_head, do_head, base + row, level + row, delta + row, q_strides, do_strides,
                b, h, k_start, k_ok, sizes, aux, seed, limit, scale, first, full_first - first, jump, last - first - jump,
                SCORE, FACTOR, DEEP, DSCORE, DRATIO, True, DROPOUT,
                D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
            )  # fmt: skip

    store_rows(dk, dk0 * DFACTOR, k_start, M, dk_strides[2], dk_strides[3], 0, D0, D, BLOCK_N)
    store_rows(dv, dv0 * scale, k_start, M, dv_strides[2], dv_strides[3], 0, V0, DV, BLOCK_N)
    if D1 > 0:
        store_rows(dk, dk1 * DFACTOR, k_start, M, dk_strides[2], dk_strides[3], D0, D1, D, BLOCK_N)
    if V1 > 0:
        store_rows(dv, dv1 * scale, k_start, M, dv_strides[2], dv_strides[3], V0, V1, DV, BLOCK_N)


@triton.jit
def _dq_loop(
    dq0, dq1,  # (BLOCK_M, D0), (BLOCK_M, D1)
    q0, q1, do0, do1, k, v, row_base, row_level, row_delta, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux, daux,
    seed, limit, scale, first, cut, jump, count,
    SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr, DRATIO: tl.constexpr,
    CAPTURES: tl.constexpr, TAIL: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds `count` key tiles to dq of one query tile, and to the gradients of captured tensors."""
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
        if DROPOUT:
            keep = keep_tile(seed, limit, b * sizes[1] + h, q_start, start, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp * scale, 0.0)
        dx = p * (dp - row_delta[:, None])
        if TAIL:
            dx = tl.where(k_ok, dx, 0.0)
        if CAPTURES is not None:
            CAPTURES(s, dx, b, h, rows, keys, rows < N, keys < M, sizes, aux, daux)
        ds = DSCORE(s, dx, b, h, rows, keys, q_ok, k_ok, sizes, aux)
        if DRATIO != 1.0:
            ds = ds * DRATIO
        ds = ds.to(k0.dtype)
        dq0 = dot(ds, k0, dq0, PRECISION)
        if D1 > 0:
            dq1 = dot(ds, k1, dq1, PRECISION)
    return dq0, dq1


@triton.jit(do_not_specialize=["B", "H", "N", "M", "group", "limit", "scale"])
def _dq(
    q, k, v, do, dq, base, level, delta, flags, seed, aux, daux, q_strides, k_strides, v_strides, do_strides, dq_strides,
    B, H, N, M, group, limit, scale,
    BOUNDS: tl.constexpr, SCORE: tl.constexpr, FACTOR: tl.constexpr, DEEP: tl.constexpr, DSCORE: tl.constexpr,
    DRATIO: tl.constexpr, CAPTURES: tl.constexpr, FULL_SCORE: tl.constexpr, FULL_FACTOR: tl.constexpr,
    FULL_DEEP: tl.constexpr, FULL_DSCORE: tl.constexpr, FULL_CAPTURES: tl.constexpr, DFACTOR: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_M: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    q_strides = (q_strides[0] * ALIGN, q_strides[1] * ALIGN, q_strides[2] * ALIGN, q_strides[3])
    k_strides = (k_strides[0] * ALIGN, k_strides[1] * ALIGN, k_strides[2] * ALIGN, k_strides[3])
    v_strides = (v_strides[0] * ALIGN, v_strides[1] * ALIGN, v_strides[2] * ALIGN, v_strides[3])
    do_strides = (do_strides[0] * ALIGN, do_strides[1] * ALIGN, do_strides[2] * ALIGN, do_strides[3])
    sizes = (B, H, N, M)
    q_tiles = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    q_start = (q_tiles - 1 - pid % q_tiles) * BLOCK_M
    b = pid // q_tiles // H
    h = pid // q_tiles % H
    batch = tl.cast(b, tl.int64)
    head = tl.cast(h, tl.int64)
    kv_head = h // group
    q += batch * q_strides[0] + head * q_strides[1]
    do += batch * do_strides[0] + head * do_strides[1]
    dq += batch * dq_strides[0] + head * dq_strides[1]
    if not TMA:
        k += batch * k_strides[0] + tl.cast(kv_head, tl.int64) * k_strides[1]
        v += batch * v_strides[0] + tl.cast(kv_head, tl.int64) * v_strides[1]
    if DROPOUT:
        seed = tl.load(seed)
    rows = q_start + tl.arange(0, BLOCK_M)
    if EVEN_N:
        q_ok: tl.constexpr = True
    else:
        q_ok = (rows < N)[:, None]
    row = (batch * H + h) * N + rows
    row_base = tl.load(base + row, mask=rows < N, other=0.0)
    row_level = tl.load(level + row, mask=rows < N, other=0.0)
    row_delta = tl.load(delta + row, mask=rows < N, other=0.0)

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
        every = tl.load(flags + b * H + h) != 0
        first = tl.where(every, 0, first)
        last = tl.where(every, tl.cdiv(M, BLOCK_N), last)
        full_first = tl.where(every, 0, full_first)
        full_last = tl.where(every, 0, full_last)
    dq0, dq1 = _dq_loop(
        dq0, dq1, q0, q1, do0, do1, k, v, row_base, row_level, row_delta, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux, daux,
        seed, limit, scale, full_first, 0, 0, full_last - full_first,
        FULL_SCORE, FULL_FACTOR, FULL_DEEP, FULL_DSCORE, 1.0, FULL_CAPTURES, False, DROPOUT,
        D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
    )  # fmt: skip
    if not (BOUNDS is None and EVEN_M):
        jump = full_last - full_first
        dq0, dq1 = _dq_loop(
            dq0, dq1, q0, q1, do0, do1, k, v, row_base, row_level, row_delta, k_strides, v_strides, b, h, kv_head, q_start, q_ok, sizes, aux, daux,
            seed, limit, scale, first, full_first - first, jump, last - first - jump,
            SCORE, FACTOR, DEEP, DSCORE, DRATIO, CAPTURES, True, DROPOUT,
            D, D0, D1, DV, V0, V1, BLOCK_M, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
    store_rows(dq, dq0 * DFACTOR, q_start, N, dq_strides[2], dq_strides[3], 0, D0, D, BLOCK_M)
    if D1 > 0:
        store_rows(dq, dq1 * DFACTOR, q_start, N, dq_strides[2], dq_strides[3], D0, D1, D, BLOCK_M)


# ---------------------------------------------------------------- host side


def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    params: Sequence[int],
    program: Program,
    dropout_p: float,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[bool],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dcaptures: Sequence[torch.Tensor | None],
    dkdv_tile: configs.Tile | None = None,
    dq_tile: configs.Tile | None = None,
) -> None:
    """Fills dq, dk, dv (any strides) and adds to `dcaptures` (fp32, zeroed by the caller, one for each flagged capture).

    Args:
        do: (B, H, N, Dv), any strides; q ... lse: what the forward got and gave.
        needs: one flag for each capture.
        dkdv_tile, dq_tile: override the measured choice of `configs`.

    Raises:
        TypeError, ValueError: a dtype, head dim or length that these kernels do not take.
    """
    check(q, k, v)
    B, H, N, D = q.shape
    kv_heads, M, DV = k.shape[1], k.shape[2], v.shape[3]
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    wrt = tuple(i for i, need in enumerate(needs) if need and program.captures[i].kind == "float")
    plan = parts(program, wrt, q.dtype == torch.bfloat16)
    masked = plan.masked
    (D0, D1), (V0, V1) = split(D), split(DV)
    dropout, limit, scale = dropout_p > 0, threshold(dropout_p), keep_scale(dropout_p)
    seed = seed if dropout else None

    delta = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    flags = torch.zeros((B, H), dtype=torch.int32, device=q.device)
    floor = max((plan.floor + 24) * 1.4426950408889634, -3.4e38)  # base 2; 24 > log(M): no longer sequence is taken
    flag = plan.kv_bounds is not None or plan.q_bounds is not None
    rows = 64
    align, (gs, os) = strides(do, out)
    _delta[(triton.cdiv(N, rows) * B * H,)](
        do, out, lse, delta, flags, gs, os, H, N, floor,
        flag, align, DV, triton.next_power_of_2(DV), rows, num_warps=4,
    )  # fmt: skip

    aux = codegen.aux_arguments(program, captures, params)
    align, (qs, ks, vs, gs) = strides(q, k, v, do)
    mode = precision(q.dtype)
    base, level = lse, lse
    if masked.deep:
        base, level = torch.empty_like(lse), torch.empty_like(lse)
        _deep_rows[(triton.cdiv(N, rows) * B * H,)](
            q, k, lse, base, level, aux, qs, ks, B, H, N, M, H // kv_heads, -512.0 if plan.full.deep else floor,
            masked.score, masked.factor, align, D, D0, D1, rows, 32, mode, num_warps=4, num_stages=1,
        )  # fmt: skip
    full = plan.full if plan.q_bounds is not None else masked
    tile = dkdv_tile or configs.backward_dkdv(N, M, D, DV, q.dtype, program)
    tma = tile.tma and D1 == 0 and V1 == 0 and describable(q, do)
    _dkdv[(triton.cdiv(M, tile.block_n) * B * kv_heads,)](
        describe(q, tile.block_m, D0) if tma else q, k, v, describe(do, tile.block_m, V0) if tma else do, dk, dv, base, level, delta, flags, seed, aux, qs, ks, vs, gs, dk.stride(), dv.stride(),
        B, H, N, M, H // kv_heads, limit, scale,
        plan.q_bounds, masked.score, masked.factor, masked.deep, masked.dscore, masked.dfactor / full.dfactor,
        full.score, full.factor, full.deep, full.dscore, full.dfactor,
        dropout, N % tile.block_m == 0, M % tile.block_n == 0, align,
        D, D0, D1, DV, V0, V1, tile.block_m, tile.block_n, mode, tma, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    full = plan.full if plan.kv_bounds is not None else masked
    tile = dq_tile or configs.backward_dq(N, M, D, DV, q.dtype, program)
    tma = tile.tma and D1 == 0 and V1 == 0 and describable(k, v)
    _dq[(triton.cdiv(N, tile.block_m) * B * H,)](
        q, describe(k, tile.block_n, D0) if tma else k, describe(v, tile.block_n, V0) if tma else v, do, dq, base, level, delta, flags, seed, aux, codegen.gradient_arguments([dcaptures[i] for i in wrt]),
        qs, ks, vs, gs, dq.stride(), B, H, N, M, H // kv_heads, limit, scale,
        plan.kv_bounds, masked.score, masked.factor, masked.deep, masked.dscore, masked.dfactor / full.dfactor, masked.captures,
        full.score, full.factor, full.deep, full.dscore, full.captures, full.dfactor,
        dropout, N % tile.block_m == 0, M % tile.block_n == 0, align,
        D, D0, D1, DV, V0, V1, tile.block_m, tile.block_n, mode, tma, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
