"""Which tiles of scores do the tensors of a call leave alive? Documents and ready-made masks, asked once a call.

A predicate that reads tensors at the query and the key (`tiles.pair_mask`) has no bounds that could be solved for. Two small
kernels look. The first goes over the mask once, where structure leaves something of it, and writes what each tile is:

    0  dead: no element is alive      1  alive in part      2  plain: the score is the full program's everywhere

The second looks along each row of that map, and for the backward along each column, and writes four numbers: the first tile
that is not dead and one past the last, then the longest run of plain ones. A dead tile in between stays masked. The bounds of a
tile (`codegen.bounds`) are then looked up there: structure and padding are in the mask that was asked.

Nothing is kept from call to call: that a tensor is the same one does not say that its elements are.
"""

# Device functions are Triton's dialect, not Python's.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import configs
from .arguments import tiles_of
from .codegen import PairMask
from .launch import Launch
from .program import Program
from .tiles import pair_mask

__all__ = ["PairRanges", "asks"]

_WIDE = 1024  # most keys that a program looks at
_ELEMENTS = 8192  # looked at together
_LINE = 1024  # most tiles of a row that are looked at together
_WARPS = 8


@triton.jit(do_not_specialize=["heads", "B", "H", "N", "M"])
def _tile_map(
    tiles, aux, heads, B, H, N, M,
    BOUNDS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """tiles[b, h, i, j] for tiles of ROWS queries by COLUMNS keys; a program has those of WIDE keys, and looks at STEP queries
    at a time. What is past the ends is of no account."""
    sizes = (B, H, N, M)
    q_tiles = tl.cdiv(N, ROWS)
    k_tiles = tl.cdiv(M, COLUMNS)
    strips = tl.cdiv(M, WIDE)
    pid = tl.program_id(0)
    strip = pid % strips
    line = pid // strips  # of all batches and heads
    own = line // q_tiles
    b = own // heads
    h = own % heads
    start = line % q_tiles * ROWS
    end = tl.minimum(start + ROWS, N)
    keys = (strip * WIDE + tl.arange(0, WIDE))[None, :]
    k_ok = keys < M
    count = tl.cdiv(end - start, STEP)
    if BOUNDS is not None:
        lo, hi, _, _ = BOUNDS(start, end - 1, b, h, sizes, aux)
        reached = (lo < hi) & (lo < (strip + 1) * WIDE) & (hi > strip * WIDE)
        count = tl.where(reached, count, 0)
    some = tl.zeros((STEP, WIDE), tl.int32)
    every = tl.full((STEP, WIDE), 1, tl.int32)
    for i in tl.range(0, count):
        rows = (start + i * STEP + tl.arange(0, STEP))[:, None]
        q_ok = rows < end
        alive, plain = MASK(b, h, rows, keys, q_ok, k_ok, sizes, aux)
        inside = q_ok & k_ok  # (STEP, WIDE)
        some = tl.where(inside & alive, 1, some)
        every = tl.where(inside & (plain == 0), 0, every)
    some = tl.max(tl.reshape(tl.max(some, 0), (WIDE // COLUMNS, COLUMNS)), 1)
    every = tl.min(tl.reshape(tl.min(every, 0), (WIDE // COLUMNS, COLUMNS)), 1)
    at = strip * (WIDE // COLUMNS) + tl.arange(0, WIDE // COLUMNS)
    value = tl.where(some == 0, 0, 1 + every)
    tl.store(tiles + tl.cast(line, tl.int64) * k_tiles + at, value.to(tl.int8), mask=at < k_tiles)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["lines", "N", "M"])
def _line_ranges(ranges, tiles, lines, N, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """ranges[pid] = (lo, hi, full_lo, full_hi) of a row of the map, in keys, or of a column, in queries: columns come after all
    rows of their batch and head, if `lines` has room for them. (size, 0, ...) where a line is dead."""
    q_tiles = tl.cdiv(N, ROWS)
    k_tiles = tl.cdiv(M, COLUMNS)
    pid = tl.program_id(0)
    line = pid % lines
    row = line < q_tiles
    length = tl.where(row, k_tiles, q_tiles)
    step = tl.where(row, 1, k_tiles)
    first = tl.where(row, tl.cast(line, tl.int64) * k_tiles, line - q_tiles)
    first += tl.cast(pid // lines, tl.int64) * q_tiles * k_tiles
    lo = length
    hi = 0
    full_lo = 0
    full_hi = 0
    open = 0  # where the run of plain tiles begins that the last block ends with
    for i in tl.range(0, tl.cdiv(length, BLOCK)):
        at = i * BLOCK + tl.arange(0, BLOCK)
        tile = tl.load(tiles + first + tl.cast(at, tl.int64) * step, mask=at < length, other=0).to(tl.int32)
        lo = tl.minimum(lo, tl.min(tl.where(tile > 0, at, length), 0))
        hi = tl.maximum(hi, tl.max(tl.where(tile > 0, at + 1, 0), 0))
        begin = tl.maximum(tl.associative_scan(tl.where(tile == 2, 0, at + 1), 0, _larger), open)  # of the run up to here
        run = at + 1 - begin
        longest = tl.max(run, 0)
        end = tl.max(tl.where(run == longest, at + 1, 0), 0)
        better = longest > full_hi - full_lo
        full_lo = tl.where(better, end - longest, full_lo)
        full_hi = tl.where(better, end, full_hi)
        open = tl.max(begin, 0)
    unit = tl.where(row, COLUMNS, ROWS)
    size = tl.where(row, M, N)
    tl.store(ranges + 4 * pid, tl.minimum(lo * unit, size))
    tl.store(ranges + 4 * pid + 1, tl.minimum(hi * unit, size))
    tl.store(ranges + 4 * pid + 2, tl.minimum(full_lo * unit, size))
    tl.store(ranges + 4 * pid + 3, tl.minimum(full_hi * unit, size))


def asks(program: Program, wrt: tuple[int, ...], sizes: tuple[int, int, int, int]) -> bool:
    """Whether it pays to look at the mask of `program` in a call of these sizes (B, H, N, M), by `configs`.

    wrt: the captures whose gradients are wanted.
    """
    batch, heads, n, m = sizes
    if batch * heads * n * m < configs.FEW_PAIR_SCORES:
        return False
    mask = pair_mask(program, wrt)
    if mask is None:
        return False
    own = (batch if mask.depends_on("b") else 1) * (heads if mask.depends_on("h") else 1)
    return batch * heads >= configs.PAIR_SHARERS * own


def _power(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class PairRanges:
    """The launches for one kind of call; gives aux with the ranges, (batches, heads, lines, 4) int32, their strides and the
    granularity at its end.

    Args:
        mask: `codegen.pair_mask` of the program.
        sizes: B, H, N, M of the calls.
        rows, columns: of a tile of the map: powers of two of at least 16.
        backward: whether the ranges of queries are asked for, too.
    """

    def __init__(self, mask: PairMask, sizes: tuple[int, int, int, int], rows: int, columns: int, *, backward: bool) -> None:
        batch, heads, n, m = sizes
        batches, heads = batch if mask.by_b else 1, heads if mask.by_h else 1
        q_tiles, k_tiles = tiles_of(n, rows), tiles_of(m, columns)
        lines = q_tiles + (k_tiles if backward else 0)
        own = batches * heads
        self.shape = (batches, heads, lines, 4)
        self.tiles = own * q_tiles * k_tiles
        self.end = (4 * lines * heads if batches > 1 else 0, 4 * lines if heads > 1 else 0, rows, columns)
        wide = max(columns, min(_WIDE, _power(m)))
        step = max(1, min(rows, _ELEMENTS // wide))
        constants = (heads, *sizes, mask.bounds, mask.function, rows, columns, step, wide)
        self.look = Launch(_tile_map, own * q_tiles * tiles_of(m, wide), constants, _WARPS, 1)
        block = max(16, min(_LINE, _power(max(q_tiles if backward else 0, k_tiles))))
        self.sum = Launch(_line_ranges, own * lines, (lines, n, m, rows, columns, block), 4, 1)

    def __call__(self, aux: tuple[Any, ...], device: torch.device, stream: int | None = None) -> tuple[Any, ...]:
        ranges = torch.empty(self.shape, dtype=torch.int32, device=device)
        tiles = torch.empty(self.tiles, dtype=torch.int8, device=device)
        self.look(stream, tiles, aux)
        self.sum(stream, ranges, tiles)
        return (*aux, ranges, *self.end)
