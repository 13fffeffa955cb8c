"""Device functions that the attention kernels and the generated score functions share: tiles, products, ranges, scalar math."""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "FLAG_ROWS",
    "any_flag",
    "awaited",
    "dot",
    "dot_pair",
    "floor_divide",
    "floor_modulo",
    "keys_inside",
    "keys_of_pairs",
    "load_rows",
    "probability",
    "queries_of_keys",
    "queries_of_pairs",
    "store_rows",
    "stream_rows",
    "tile_ranges",
    "visited",
]

LOG2E = tl.constexpr(1.4426950408889634)


# ---------------------------------------------------------------- integers, rounded as Python does (divisor > 0)


@triton.jit
def floor_divide(a, b):
    quotient = a // b  # Triton rounds to zero
    return tl.where(quotient * b > a, quotient - 1, quotient)


@triton.jit
def floor_modulo(a, b):
    rest = a % b  # takes the sign of a
    return tl.where(rest < 0, rest + b, rest)


# ---------------------------------------------------------------- tiles of rows


@triton.jit
def row_pointers(x, start, row_stride, column_stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.cast(tl.arange(0, ROWS), tl.int64)
    columns = tl.cast(FIRST + tl.arange(0, WIDTH), tl.int64)
    # (ROWS, WIDTH); the bracket does not change from tile to tile
    return x + tl.cast(start, tl.int64) * row_stride + (rows[:, None] * row_stride + columns[None, :] * column_stride)


@triton.jit
def load_rows(
    x, start, size, row_stride, column_stride,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + ROWS), columns [FIRST, FIRST + WIDTH) of a matrix; zeros past DIM and, if TAIL, past `size`."""
    pointers = row_pointers(x, start, row_stride, column_stride, FIRST, WIDTH, ROWS)
    rows = start + tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, WIDTH)
    if FIRST + WIDTH > DIM and TAIL:
        return tl.load(pointers, mask=(rows[:, None] < size) & (columns[None, :] < DIM), other=0.0)
    elif FIRST + WIDTH > DIM:
        return tl.load(pointers, mask=(columns[None, :] < DIM) & (rows[:, None] >= 0), other=0.0)
    elif TAIL:
        return tl.load(pointers, mask=rows[:, None] < size, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def stream_rows(
    x, tensor_strides, b, h, start, size,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of the inner loop: x is the head's pointer, or with TMA the descriptor of the whole (B, H, rows, DIM) tensor."""
    if TMA:
        return tl.reshape(x.load([b, h, start, FIRST]), (ROWS, WIDTH))
    else:
        return load_rows(x, start, size, tensor_strides[2], tensor_strides[3], FIRST, WIDTH, DIM, ROWS, TAIL)


@triton.jit
def store_rows(
    x, value, start, size, row_stride, column_stride,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pointers = row_pointers(x, start, row_stride, column_stride, FIRST, WIDTH, ROWS)
    rows = start + tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows[:, None] < size) & (columns[None, :] < DIM)
    tl.store(pointers, value.to(x.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- products


# Over 200 and more terms, sums kept in the tensor cores' fp32 accumulator had 3.6 times eager's error (dq, D = 200; at 128 they
# had 1.6 times). Exact fp32 ("tf32x3") therefore adds tile by tile with the ordinary adder; a limit on imprecise sums is what
# keeps the compiler from folding that addition back into the product.


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    if PRECISION == "tf32x3":
        return accumulator + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))


@triton.jit
def awaited(x):
    """x, as it is: the compiler has to have it here, and may not move what makes it.

    A product that runs on into the next turn of a loop, past a store, makes ptxas serialise all the products of the loop
    (its warning C7515); dq with its slots then took 2.26 ms instead of 2.08 (N = 4096, D = 128). What dropout leaves of a
    probability would be chosen after the rounding to 16 bits, at two more instructions an element.
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot_pair(a0, a1, b0, b1, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a0 @ b0.T + a1 @ b1.T: a head dim in two parts (72 = 64 + 8); the second is absent unless SECOND."""
    out = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if SECOND:
        out = dot(a1, tl.trans(b1), out, PRECISION)
    return out


# ---------------------------------------------------------------- which tiles to visit


@triton.jit
def tile_ranges(lo, hi, full_lo, full_hi, size, BLOCK: tl.constexpr):
    """Element ranges -> tile numbers (first, last, full_first, full_last), clamped; a full tile lies in [0, size) as a whole."""
    tiles = tl.cdiv(size, BLOCK)
    first = tl.minimum(tl.maximum(lo, 0) // BLOCK, tiles)
    last = tl.maximum(tl.cdiv(tl.minimum(tl.maximum(hi, 0), size), BLOCK), first)
    last = tl.where(hi <= lo, first, last)
    full_first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_lo, 0), BLOCK), first), last)
    full_last = tl.minimum(tl.maximum(full_hi, 0) // BLOCK, tl.minimum(size // BLOCK, last))
    return first, last, full_first, tl.maximum(full_last, full_first)


@triton.jit
def keys_inside(lo, hi, full_lo, full_hi, ranges):
    """The key ranges of a query tile, inside what `key_ranges` found of its head."""
    lo = tl.maximum(lo, tl.load(ranges))
    hi = tl.minimum(hi, tl.load(ranges + 1))
    return lo, hi, tl.maximum(full_lo, tl.load(ranges + 2)), tl.minimum(full_hi, tl.load(ranges + 3))


@triton.jit
def queries_of_keys(k0, k1, lo, hi, full_lo, full_hi, ranges):
    """The query ranges of the keys k0 to k1: none where they all are dead, none in full where one may be."""
    reached = (k1 >= tl.load(ranges)) & (k0 < tl.load(ranges + 1))
    alive = (k0 >= tl.load(ranges + 2)) & (k1 < tl.load(ranges + 3))
    return lo, tl.where(reached, hi, 0), full_lo, tl.where(alive, full_hi, 0)


@triton.jit
def _together(ranges, first, last, size):
    """Of the tiles first to last of a mask: where some of them have a live element, and where each is plain."""
    lo = size
    hi = 0
    full_lo = 0
    full_hi = size
    for i in tl.range(first, last + 1):
        at = ranges + 4 * i
        lo = tl.minimum(lo, tl.load(at))
        hi = tl.maximum(hi, tl.load(at + 1))
        full_lo = tl.maximum(full_lo, tl.load(at + 2))
        full_hi = tl.minimum(full_hi, tl.load(at + 3))
    return lo, hi, full_lo, full_hi


@triton.jit
def keys_of_pairs(q0, q1, b, h, sizes, ranges, b_stride, h_stride, rows, columns):
    """The key ranges of the queries q0 to q1, as `pair_ranges` found them for `rows` at a time."""
    own = ranges + tl.cast(b, tl.int64) * b_stride + tl.cast(h, tl.int64) * h_stride
    return _together(own, q0 // rows, q1 // rows, sizes[3])


@triton.jit
def queries_of_pairs(k0, k1, b, h, sizes, ranges, b_stride, h_stride, rows, columns):
    """The query ranges of the keys k0 to k1, which lie behind those of all queries."""
    own = ranges + tl.cast(b, tl.int64) * b_stride + tl.cast(h, tl.int64) * h_stride + 4 * tl.cdiv(sizes[2], rows)
    return _together(own, k0 // columns, k1 // columns, sizes[2])


@triton.jit
def visited(i, first, cut, jump):
    """The i-th of the tiles first, first + 1, ..., where after `cut` of them `jump` tiles are left out."""
    return first + i + tl.where(i < cut, 0, jump)


FLAG_ROWS = tl.constexpr(64)  # rows of one flag


@triton.jit
def any_flag(flags, bh, start, end, size):
    """Whether a flag of rows [start, end) of this head is set: one int32 for each FLAG_ROWS of its `size` rows."""
    flags += tl.cast(bh, tl.int64) * tl.cdiv(size, FLAG_ROWS)
    last = tl.cdiv(tl.minimum(end, size), FLAG_ROWS)
    found = tl.zeros((64,), tl.int32)
    for first in tl.range(start // FLAG_ROWS, last, 64):
        at = first + tl.arange(0, 64)
        found |= tl.load(flags + at, mask=at < last, other=0)
    return tl.max(found, 0) != 0


# ---------------------------------------------------------------- probabilities


@triton.jit
def probability(x, base, level, SCALE: tl.constexpr, DEEP: tl.constexpr):
    """2^((x - base) * SCALE - level); base is 0 unless DEEP (see `backward`)."""
    if DEEP:
        return tl.math.exp2((x - base) * SCALE - level)
    else:
        return tl.math.exp2(x * SCALE - level)


# ---------------------------------------------------------------- score math


@triton.jit
def tanh_approximate(x):
    """One instruction; relative error 2^-11, a quarter of a bf16 rounding."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh_exact(x):
    """Within about 2 ulp: an odd polynomial near zero (Cephes), 1 - 2 / (exp(2|x|) + 1) elsewhere."""
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, series * z * x + x, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def truncate(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


# The five below are for Triton's interpreter, where libdevice does not exist.


@triton.jit
def log1p_plain(x):
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * x / tl.where(y == 1.0, 1.0, y - 1.0))


@triton.jit
def expm1_plain(x):
    y = tl.exp(x)
    ratio = (y - 1.0) * x / tl.log(tl.where(y == 1.0, 2.0, y))
    return tl.where(y == 1.0, x, tl.where(y - 1.0 == -1.0, -1.0, tl.where(y == float("inf"), y, ratio)))


@triton.jit
def power_plain(x, y):
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    half = y * 0.5
    odd = (tl.floor(y) == y) & (tl.floor(half) != half)
    value = tl.where(x < 0, tl.where(odd, -size, tl.where(tl.floor(y) == y, size, float("nan"))), size)
    return tl.where(y == 0, 1.0, value)
