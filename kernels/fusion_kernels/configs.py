"""Tile shapes, as data: what was fastest on one H200 for each kind of work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = [
    "EXACT_FP32", "FEW_PAIR_SCORES", "FEW_SCORES", "MANY_SCORES", "PAIR_SHARERS", "SHORT", "SLOTS", "SLOT_PROGRAMS", "Tile",
    "Traits", "asking", "backward_dkdv", "backward_dq", "backward_table", "described", "forward", "together",
]  # fmt: skip

# Where tf32 is not allowed, fp32 products are three tf32 products on the tensor cores: at most 1.6 times eager's error
# at 3 to 20 times the speed of plain multiply-add, "ieee" (causal, N = 1024, D = 64 and 128; before `device.dot` added by tile).
EXACT_FP32 = "tf32x3"

# With fewer scores (B * H * N * M) than this nobody asks which keys padding hides (`key_ranges`): it takes one more launch,
# some 10 us. An estimate between measurements: padding of a quarter that was left in cost 0.9 of FlexAttention's speed forward
# and 0.8 backward at 2^27 and 2^28 scores; at 2^26 a forward was bound by the host.
FEW_SCORES = 1 << 26

# With fewer scores than this nobody asks which pairs of a query and a key tensors hide (`pair_ranges`), nor where fewer heads, of
# all batches, share a mask. Both are estimates between measurements. A call takes two launches more; 2^27 scores take some 100 us
# forward (D = 64). An element of a mask takes some 0.3 ps of the device (a byte at 3 TB/s, or ten instructions of 30 T a second),
# a score 0.7 (D = 64) to 1.2 ps (D = 128) forward, 2.5 times that backward: of a mask that eight heads share, and that turns out
# to hide nothing, at most 0.06 of a forward is lost, 0.03 of a backward.
FEW_PAIR_SCORES = 1 << 27
PAIR_SHARERS = 8

# Memory for the parts of a learned table's gradient (`backward_slots`): so many bytes, or two waves of programs of one H200 where
# these have longer rows. A learned bias took 5.60 ms backward with half of it, 5.48 with twice as much (B = 4, N = 4096,
# D = 128). With bytes alone, at N = 16384, half of the device had no program.
SLOTS = 1 << 28
SLOT_PROGRAMS = 264

# Shorter sequences are read through pointers unless there are many scores: a descriptor for the copy engine costs 5 us of host
# time at each launch. At N = 512 and 1024 it took 0.87 to 1 of the time backward, 0.95 to 1.04 forward (2^27 and 2^28 scores,
# D = 128 and 64, eight kinds of programs).
SHORT = 2048
MANY_SCORES = 1 << 27


@dataclass(frozen=True)
class Tile:
    """block_m queries by block_n keys, `warps` warps a program, `stages` tiles of the loop in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False  # the inner loop reads through Hopper's copy engine, where the strides allow


def _smaller(tile: Tile, rows: int, columns: int) -> Tile:
    """The tile, cut for short sequences: no dim needs to be more than the next power of two (of at least 16)."""
    fit_m = max(16, 1 << max(rows - 1, 0).bit_length())
    fit_n = max(16, 1 << max(columns - 1, 0).bit_length())
    if fit_m >= tile.block_m and fit_n >= tile.block_n:
        return tile
    return Tile(min(tile.block_m, fit_m), min(tile.block_n, fit_n), min(tile.warps, 4), tile.stages, tile.tma)


@dataclass(frozen=True)
class Traits:
    """What the choice depends on, of a program.

    masked: tiles can be skipped; busy: it loads along q or k, or computes a lot (registers); table: it loads an element for each
    (q, k); shared: the same one for every batch; learned: some table needs a gradient; dropout; parts: a head dim is split in two
    (72 = 64 + 8).
    """

    masked: bool = False
    busy: bool = False
    table: bool = False
    shared: bool = False
    learned: bool = False
    dropout: bool = False
    parts: bool = False

    @property
    def row(self) -> str:
        """The row of the tables below that serves."""
        if self.parts:
            return "parts"
        if self.table:
            return "table"
        if self.dropout:
            return "dropout"
        return "masked" if self.masked or self.busy else "full"


# 16-bit operands: head dim up to -> tile. The numbers are TFLOP/s on one H200, bf16, N = M = 4096, B = 4, 2048 / D heads, one
# do_bench median a tile: the choice, and in brackets the best of the others ("masked" under a causal mask, "parts" at D = 80
# under one). A tile without a number was not timed.
_FORWARD = {
    "full": {64: Tile(128, 128, 4, 3, True), 128: Tile(128, 128, 8, 3), 256: Tile(64, 64, 4, 3, True)},  # 437 (423), 493 (480)
    "masked": {
        64: Tile(64, 64, 4, 2, True),  # 371 (385: 128 x 64); under a window of 256 237 (201 for that one, 215)
        128: Tile(64, 64, 4, 3, True),  # 432 (434); window 242 (242)
        256: Tile(64, 64, 4, 3, True),  # 453 (446)
    },
    "table": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 4, 2, True)},  # 344 (335), 433 (410)
    "dropout": {
        64: Tile(64, 64, 4, 3, True),
        128: Tile(64, 64, 4, 3, True),
        256: Tile(64, 64, 4, 2, True),
    },  # 313 (313), 453 (427)
    "parts": {128: Tile(128, 64, 4, 3), 256: Tile(64, 64, 4, 2)},  # 345 (331)
}
_DKDV = {
    "full": {64: Tile(64, 64, 4, 3, True), 128: Tile(64, 128, 8, 3), 256: Tile(64, 64, 8, 2, True)},  # 360 (356), 382 (371)
    "masked": {64: Tile(64, 64, 4, 3, True), 128: Tile(64, 64, 4, 2, True), 256: Tile(64, 64, 8, 2, True)},  # 290, 338, 216 (197)
    "table": {64: Tile(64, 64, 4, 2, True), 128: Tile(64, 64, 4, 2, True), 256: Tile(64, 64, 8, 2, True)},  # at 128: 263 (247)
    "dropout": {64: Tile(64, 64, 4, 3), 128: Tile(64, 128, 8, 3), 256: Tile(64, 64, 8, 2, True)},  # 292 (282), 341 (339)
    "parts": {128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 2)},  # 240 (218)
}
_DQ = {
    "full": {
        64: Tile(128, 64, 4, 3, True),
        128: Tile(128, 64, 8, 3, True),
        256: Tile(64, 64, 4, 2, True),
    },  # 339 (341), 375 (369)
    "masked": {
        64: Tile(64, 64, 4, 2, True),  # 324 (314); window 171 (168)
        128: Tile(64, 64, 4, 2, True),  # 333 (336); window 191 (188)
        256: Tile(64, 64, 4, 2, True),
    },
    "table": {64: Tile(128, 64, 8, 3, True), 128: Tile(128, 64, 8, 3, True), 256: Tile(64, 64, 4, 2, True)},  # at 128: 276 (274)
    # with slots for the gradient: 7.70 ms (8.12: 128 x 64) at 64, 5.55 (5.74: 64 x 64) at 128, whole backward
    "learned": {64: Tile(64, 64, 4, 3, True), 128: Tile(128, 64, 8, 3, True), 256: Tile(64, 64, 4, 2, True)},
    "dropout": {
        64: Tile(64, 64, 4, 3, True),
        128: Tile(64, 64, 4, 2, True),
        256: Tile(64, 64, 4, 2, True),
    },  # 293 (289), 341 (339)
    "parts": {128: Tile(64, 64, 4, 2), 256: Tile(64, 64, 8, 2)},  # 256 (216)
}
# fp32 operands, exact products (causal, B = 4, N = 4096).
_FORWARD32 = {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 4, 1)}  # 53 (50), 39 (27)
_DKDV32 = {64: Tile(32, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 4, 1)}  # 28 (28), 26 (27)
_DQ32 = {64: Tile(64, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 4, 1)}  # 32 (29), 26 (20)
_TABLE = {64: Tile(64, 64, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 4, 1)}  # at 64, whole backward: 140 (139)
_TABLE32 = {128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)}


def asking() -> tuple[int, ...]:
    """What decides of which masks a call asks tensors."""
    return FEW_SCORES, FEW_PAIR_SCORES, PAIR_SHARERS


def _pick(table: dict[int, Tile], d: int, dv: int, n: int, m: int) -> Tile:
    return _smaller(table[min(limit for limit in table if limit >= max(d, dv))], n, m)


def described(length: int, scores: int) -> bool:
    """Whether the copy engine's descriptors pay for a loop over `length` rows, in a call of so many scores."""
    return length >= SHORT or scores >= MANY_SCORES


def together(batch: int, traits: Traits) -> int:
    """How many batches take turns, tile by tile: where they share a table, its tile is still in the cache for the next of them.

    With four of them (B = 4, D = 128, N = 4096, bf16) 1.42 ms forward instead of 1.47, 7.13 backward instead of 7.23.
    """
    return math.gcd(batch, 4) if traits.shared else 1


def forward(n: int, m: int, d: int, dv: int, dtype: torch.dtype, traits: Traits) -> Tile:
    """d, dv: head dims as the kernel covers them, padding included."""
    return _pick(_FORWARD32 if dtype == torch.float32 else _FORWARD[traits.row], d, dv, n, m)


def backward_dkdv(n: int, m: int, d: int, dv: int, dtype: torch.dtype, traits: Traits) -> Tile:
    return _pick(_DKDV32 if dtype == torch.float32 else _DKDV[traits.row], d, dv, n, m)


def backward_dq(n: int, m: int, d: int, dv: int, dtype: torch.dtype, traits: Traits) -> Tile:
    row = "learned" if traits.learned and traits.row == "table" else traits.row
    return _pick(_DQ32 if dtype == torch.float32 else _DQ[row], d, dv, n, m)


def backward_table(n: int, m: int, d: int, dv: int, dtype: torch.dtype) -> Tile:
    return _pick(_TABLE32 if dtype == torch.float32 else _TABLE, d, dv, n, m)
