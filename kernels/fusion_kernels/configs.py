"""Tile shapes, as data: what was fastest on one H200 for each kind of work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .program import Program

__all__ = ["EXACT_FP32", "Tile", "backward_dkdv", "backward_dq", "forward"]

EXACT_FP32 = "ieee"  # how fp32 products are taken when tf32 is not allowed


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


def forward(n: int, m: int, d: int, dv: int, dtype: torch.dtype, program: Program) -> Tile:
    width = max(d, dv)
    if dtype == torch.float32:
        tile = Tile(64, 32, 4, 2) if width <= 128 else Tile(32, 32, 4, 2)
    elif width <= 64:
        tile = Tile(128, 64, 4, 3)
    elif width <= 128:
        tile = Tile(128, 64, 8, 3)
    else:
        tile = Tile(64, 32, 4, 3)
    return _smaller(tile, n, m)


def backward_dkdv(n: int, m: int, d: int, dv: int, dtype: torch.dtype, program: Program) -> Tile:
    width = max(d, dv)
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1)
    elif width <= 128:
        tile = Tile(64, 128, 8, 3 if width <= 64 else 2)
    else:
        tile = Tile(32, 64, 4, 2)
    return _smaller(tile, n, m)


def backward_dq(n: int, m: int, d: int, dv: int, dtype: torch.dtype, program: Program) -> Tile:
    width = max(d, dv)
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1)
    elif width <= 128:
        tile = Tile(128, 64, 8, 3 if width <= 64 else 2)
    else:
        tile = Tile(64, 32, 4, 2)
    return _smaller(tile, n, m)
