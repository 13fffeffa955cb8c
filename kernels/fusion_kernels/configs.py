"""Tile shapes, as data: what was fastest on one H200 for each kind of work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["EXACT_FP32", "Tile", "Traits", "backward_dkdv", "backward_dq", "backward_table", "forward"]

# How fp32 products are taken where tf32 is not allowed: three tf32 products on the tensor cores. Error 1.0 to 1.6 times that of
# "ieee" (plain multiply-add, about eager's own error), 3 to 20 times its speed (causal, N = 1024, D = 64 and 128).
EXACT_FP32 = "tf32x3"


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
    """What the choice depends on, of a program. masked: tiles can be skipped; table: it loads an element for each (q, k)."""

    masked: bool
    table: bool
    dropout: bool


# Head dim up to -> tile, 16-bit operands. Measured in TFLOP/s on one H200, bf16, N = M = 4096, B = 4, 2048 / D heads: the
# choice, and the best of the others (full or masked as the table says).
_FORWARD_FULL = {64: Tile(128, 128, 4, 3, True), 128: Tile(128, 128, 8, 3), 256: Tile(64, 64, 4, 3, True)}  # 437 (423), 493 (480)
_FORWARD_MASKED = {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3, True), 256: Tile(64, 64, 4, 3, True)}  # 379 (374), 432 (434), 453 (446)
_FORWARD_TABLE = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 4, True), 256: Tile(64, 64, 4, 2, True)}  # at 128: 366 (360)
_FORWARD_DROPOUT = {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 2, True), 256: Tile(64, 64, 4, 2, True)}  # 178 (178), 259 (264)

_DKDV_FULL = {64: Tile(64, 64, 4, 3, True), 128: Tile(64, 128, 8, 3), 256: Tile(64, 64, 8, 2, True)}  # 360 (356), 382 (371)
_DKDV_MASKED = {64: Tile(64, 64, 4, 3, True), 128: Tile(64, 64, 4, 2, True), 256: Tile(64, 64, 8, 2, True)}  # 290 (288), 338 (321), 216 (197)
_DKDV_TABLE = {64: Tile(64, 64, 4, 2, True), 128: Tile(64, 64, 4, 2, True), 256: Tile(64, 64, 8, 2, True)}  # at 128: 263 (247)

_DQ_FULL = {64: Tile(128, 64, 4, 3, True), 128: Tile(128, 64, 8, 3, True), 256: Tile(64, 64, 4, 2, True)}  # 339 (341), 375 (369)
_DQ_MASKED = {64: Tile(64, 64, 4, 3, True), 128: Tile(64, 64, 4, 2, True), 256: Tile(64, 64, 4, 2, True)}  # 296 (298), 333 (336)
_DQ_TABLE = {64: Tile(128, 64, 8, 3, True), 128: Tile(128, 64, 8, 3, True), 256: Tile(64, 64, 4, 2, True)}  # at 128: 276 (274)

# Head dims of two parts (72 = 64 + 8, 80 = 64 + 16, ...), by their sum; 80, causal: 345 (331), 240 (218), 256 (216).
_FORWARD_PARTS = {128: Tile(128, 64, 4, 3), 256: Tile(64, 64, 4, 2)}
_BACKWARD_PARTS = {128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2)}


def _pick(table: dict[int, Tile], d: int, dv: int) -> Tile:
    return table[min(limit for limit in table if limit >= max(d, dv))]


def _whole(d: int) -> bool:
    return d >= 16 and d & (d - 1) == 0


def _tile(full: dict[int, Tile], masked: dict[int, Tile], table: dict[int, Tile], d: int, dv: int, traits: Traits) -> Tile:
    return _pick(table if traits.table else masked if traits.masked or traits.dropout else full, d, dv)


def forward(n: int, m: int, d: int, dv: int, dtype: torch.dtype, traits: Traits) -> Tile:
    if dtype == torch.float32:
        tile = Tile(64, 32, 4, 2) if max(d, dv) <= 128 else Tile(32, 32, 4, 2)
    elif not (_whole(d) and _whole(dv)):
        tile = _pick(_FORWARD_PARTS, d, dv)
    else:
        tile = _tile(_FORWARD_FULL, _FORWARD_DROPOUT if traits.dropout else _FORWARD_MASKED, _FORWARD_TABLE, d, dv, traits)
    return _smaller(tile, n, m)


def backward_dkdv(n: int, m: int, d: int, dv: int, dtype: torch.dtype, traits: Traits) -> Tile:
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1)
    elif not (_whole(d) and _whole(dv)):
        tile = _pick(_BACKWARD_PARTS, d, dv)
    else:
        tile = _tile(_DKDV_FULL, _DKDV_MASKED, _DKDV_TABLE, d, dv, traits)
    return _smaller(tile, n, m)


def backward_dq(n: int, m: int, d: int, dv: int, dtype: torch.dtype, traits: Traits) -> Tile:
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1)
    elif not (_whole(d) and _whole(dv)):
        tile = _pick(_BACKWARD_PARTS, d, dv)
    else:
        tile = _tile(_DQ_FULL, _DQ_MASKED, _DQ_TABLE, d, dv, traits)
    return _smaller(tile, n, m)


def backward_table(n: int, m: int, d: int, dv: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1)
    else:
        tile = Tile(128, 64, 8, 2) if max(d, dv) <= 128 else Tile(64, 64, 4, 1)
    return _smaller(tile, n, m)
