"""Which table's gradient the dq kernel stores, where, and in how many launches (see `backward_table`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs
from .arguments import tiles_of
from .backward_table import table_sums
from .codegen import Phase, Table
from .launch import Launch

__all__ = ["Kept", "Step", "keep"]

_ROWS = 32  # of a tile that a program adds up


class Step(NamedTuple):
    """dq for some query tiles from the `rank`-th on, and the sum of the slots that it fills, if it keeps a table."""

    rank: int
    dq: Launch
    total: Launch | None

    @property
    def last(self) -> Launch:
        return self.total or self.dq


@dataclass(frozen=True)
class Kept:
    """A table whose gradient dq stores: in slots of `dtype`, one a program, M long."""

    table: Table
    full: Any  # the gradient where nothing is masked
    dtype: torch.dtype
    sizes: tuple[int, ...]  # B, H, N, M, heads of q for each of k
    tile: configs.Tile  # dq's
    bounds: Any

    @property
    def functions(self) -> tuple[Any, ...]:
        """dq's constants: the gradient on masked and on full tiles, and over which dims the table is one."""
        return self.table.gradient, self.full, self.table.all_b, self.table.all_h

    @property
    def members(self) -> int:
        """How many (batch, head) pairs share the table: neighbours in a launch."""
        B, H = self.sizes[:2]
        return (B if self.table.all_b else 1) * (H if self.table.all_h else 1)

    @property
    def slot(self) -> int:
        """Bytes of a program's slot."""
        tile = self.tile
        return tile.block_m * tile.block_n * tiles_of(self.sizes[3], tile.block_n) * self.dtype.itemsize

    @property
    def programs(self) -> int:
        """How many programs there is memory for."""
        return max(configs.SLOTS // self.slot, configs.SLOT_PROGRAMS)

    def steps(self, programs: int, buffer: Tensor, launch: Callable[[int], Launch]) -> list[Step]:
        """`programs` programs of dq in launches that have slots for all of theirs. launch(n): one of n programs."""
        ranks = programs // self.members
        turns = math.ceil(ranks / (self.programs // self.members))
        each = math.ceil(ranks / turns)
        whole = launch(each * self.members), self._total(each, buffer)
        rest = ranks % each
        steps = [Step(rank, *whole) for rank in range(0, ranks - rest, each)]
        if rest:
            steps.append(Step(ranks - rest, launch(rest * self.members), self._total(rest, buffer)))
        return steps

    def scratch(self, steps: Sequence[Step]) -> tuple[torch.dtype, int]:
        """The slots of a step, in units of 4 bytes."""
        return self.dtype, steps[0].dq.grid[0] * self.slot // 4

    def _total(self, ranks: int, buffer: Tensor) -> Launch:
        table, tile = self.table, self.tile
        rows = min(tile.block_m, _ROWS)
        constants = (
            *table.strides(buffer), *self.sizes[:4], self.bounds, table.all_b, table.all_h, tile.block_m, tile.block_n, rows,
        )  # fmt: skip
        programs = ranks * tiles_of(self.sizes[3], tile.block_n) * (tile.block_m // rows)
        return Launch(table_sums, programs, constants, warps=4, stages=1)


def keep(
    masked: Phase, full: Phase, captures: Sequence[Tensor], dtype: torch.dtype, sizes: tuple[int, ...], tile: configs.Tile,
    bounds: Any,
) -> Kept | None:  # fmt: skip
    """The table whose gradient dq stores: the first, unless too many share it.

    The slots have the dtype of the table, as the gradients have that eager adds up; fp32 where the operands are fp32.
    """
    if not masked.tables:
        return None
    table = masked.tables[0]
    same = [t.gradient for t in full.tables if t.capture == table.capture]
    wide = torch.float32 in (dtype, captures[table.capture].dtype)
    kept = Kept(table, same and same[0], torch.float32 if wide else captures[table.capture].dtype, sizes, tile, bounds)
    return kept if same and kept.members <= kept.programs else None
