"""The attention backward in portable Triton: nothing N x M is kept, the probabilities are recomputed from the log-sum-exp.

With x = program(s), p = softmax(x), o = dropout(p) @ v, and D[q] = sum_d do[q, d] o[q, d]:
    dv = dropout(p)^T @ do
    dp = dropout'(do @ v^T)
    dx = p * (dp - D)                D is also sum_k p dp, because o is dropout(p) @ v
    ds = program'(s, dx)             the derivative of the program, one more generated function
    dq = ds @ k,   dk = ds^T @ q
Three kernels: D (and a flag a head, see `delta_rows`), then dk and dv with one program a tile of keys, which loops over the
queries of every head in the group, then dq with one program a tile of queries. No atomics, so the result is the same every
time. The gradients of captured tensors are gathered in the dq kernel, where the tile holds d(loss)/d(x): sums over the axes of
the tile that the load does not read, then one atomic each. A table read at (q, k) has them without (see `backward_table`). What
a sink reads has a kernel of its own, `sink_rows`: dz = -p_sink D for each row, for a sink has no value. With a weight,
dv = w(dropout(p))^T @ do and dp = dropout'(w'(do @ v^T)); D stays as it is, for w is linear.

p = 2^(x * log2(e) - lse). Where a row can have only masked scores of a finite fill, say -1e9, its log-sum-exp in fp32 has no
digits left for the sum over its keys: `deep_rows` finds the maximum and the sum of such rows again, and keeps them apart. In
exact fp32 it does so for every row, and takes D from sum_k p dp: two products more, of seven. Without, where a row is almost all
one key's, gradients were up to 50 times as far from float64 as eager's.
"""

# the language of Triton kernels is not Python's to a type checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import codegen, configs
from .arguments import Blocks, Scratch, check, describable, parts, precision, split, strides, tiles_of, traits
from .backward_kernels import dkdv_tiles, dq_tiles
from .backward_rows import deep_rows, delta_rows, sink_rows
from .backward_slots import Kept, Step, keep
from .backward_table import table_tiles
from .blanks import Place
from .device import FLAG_ROWS
from .dropout import keep_scale, threshold
from .key_ranges import KeyRanges
from .keys import Plans, allows_tf32, number, signature
from .launch import Launch
from .pair_ranges import PairRanges, asks
from .program import Program

__all__ = ["attention_backward", "plan", "stored"]

_LOG2E = 1.4426950408889634
_ROWS = FLAG_ROWS.value  # rows a program of the small kernels
_EXACT_ROWS = 32  # of those that hold both operands in fp32


Fill = Callable[..., None]  # (do, q, k, v, captures, params, seed, out, lse, dq, dk, dv, dcaptures) -> fills the last four


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
    """Fills dq, dk, dv (any strides) and adds to `dcaptures` (one for each flagged capture: fp32, zeroed by the caller; or
    as it comes, if it is `stored`).

    Args:
        do: (B, H, N, Dv), any strides; q ... lse: what the forward got and gave.
        needs: one flag for each capture.
        dkdv_tile, dq_tile: override the measured choice of `configs`.

    Raises:
        TypeError, ValueError: a dtype, head dim or length that these kernels do not take.
    """
    look = signature(do, q, k, v, seed, out, lse, dq, dk, dv, *captures), signature(*dcaptures), tuple(needs)
    tiles = dkdv_tile, dq_tile
    key = (id(program), dropout_p, look, tuple(map(number, params)), tiles, allows_tf32(), configs.asking())
    fill = _plans.get(key)
    if fill is None:
        fill = _plans[key] = plan(do, q, k, v, captures, program, dropout_p, out, lse, needs, dq, dk, dv, dcaptures, *tiles)
    with Place(q.device).entered():
        fill(do, q, k, v, captures, params, seed, out, lse, dq, dk, dv, dcaptures)


_plans: dict[Any, Fill] = Plans()


def stored(
    program: Program, captures: Sequence[torch.Tensor], needs: Sequence[bool], sizes: tuple[int, int, int, int]
) -> set[int]:
    """The captures whose whole gradient is stored, each element once: their buffers need no zeros, and may have any dtype.

    sizes: B, H, N, M.
    """
    wrt = tuple(i for i, need in enumerate(needs) if need)
    tables = parts(program, wrt, False).masked.tables if wrt and 0 not in sizes else ()
    return {t.capture for t in tables if t.covers(captures[t.capture].shape, sizes)}


@dataclass(frozen=True)
class _Plan:
    """The launches of one kind of call, and the descriptors of (q, do) for dk and dv, of (k, v) for dq.

    The current device has to be that of `place`.
    """

    program: Program  # held, so that the id in a key stays its own
    wrt: tuple[int, ...]
    dropout: bool
    place: Place
    scratch: Scratch  # numbers, flags, base, slots
    delta: Launch
    deep: Launch | None
    dkdv: Launch
    dkdv_tma: tuple[Blocks, Blocks] | None
    dq: list[Step]
    dq_tma: tuple[Blocks, Blocks] | None
    kept: Kept | None  # the table whose gradient dq's steps store
    tables: list[tuple[int, Launch]]
    sink: Launch | None
    ranges: KeyRanges | PairRanges | None  # asks what tensors hide

    def __call__(
        self, do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor],
        params: Sequence[int], seed: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
        dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dcaptures: Sequence[torch.Tensor | None],
    ) -> None:  # fmt: skip
        stream = self.place.stream()
        last = self.sink or (self.tables[-1][1] if self.tables else self.dq[-1].last)
        of = last.of  # the others have their binaries by then
        aux = codegen.aux_arguments(self.program, captures, params, of)
        daux = codegen.gradient_arguments([dcaptures[i] for i in self.wrt], of)
        if self.ranges is not None:
            aux = self.ranges(aux, q.device, stream)
        memory = self.scratch.new()
        numbers, flags, base, slots = self.scratch.split(memory, of)
        tma = self.dkdv_tma
        queries, gradients = (tma[0].of(q), tma[1].of(do)) if tma else (of(q), of(do))
        tma = self.dq_tma
        keys, values = (tma[0].of(k), tma[1].of(v)) if tma else (of(k), of(v))
        seed = seed if self.dropout else None
        do, q, k, v, lse = of(do), of(q), of(k), of(v), of(lse)
        self.delta(stream, do, of(out), lse, numbers, flags, None if seed is None else of(seed))
        if self.deep is not None:
            self.deep(stream, q, k, v, do, lse, base, numbers, flags, aux)
        rows = (lse if base is None else base, numbers, flags, aux)
        self.dkdv(stream, queries, k, v, gradients, of(dk), of(dv), *rows)
        gradient = of(dq)
        for rank, launch, total in self.dq:
            launch(stream, q, keys, values, do, gradient, *rows, daux, lse if total is None else slots, rank)
            if total is not None and self.kept is not None:
                total(stream, slots, flags, aux, of(dcaptures[self.kept.table.capture]), rank)
        for position, launch in self.tables:
            launch(stream, q, k, v, do, *rows, of(dcaptures[position]))
        if self.sink is not None:
            self.sink(stream, *rows[:2], aux, daux)


def _zeros(*arguments: Any) -> None:
    """For no queries, no keys or no head dim."""
    *_, dq, dk, dv, _ = arguments
    for gradient in (dq, dk, dv):
        gradient.zero_()


def plan(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor], program: Program,
    dropout_p: float, out: torch.Tensor, lse: torch.Tensor, needs: Sequence[bool], dq: torch.Tensor, dk: torch.Tensor,
    dv: torch.Tensor, dcaptures: Sequence[torch.Tensor | None], dkdv_tile: configs.Tile | None = None,
    dq_tile: configs.Tile | None = None,
) -> Fill:  # fmt: skip
    """What `attention_backward` does, on q's device, for every call that looks like this one (dq ... may have no memory)."""
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return _zeros
    check(q, k, v)
    B, H, N, D = q.shape
    kv_heads, M, DV = k.shape[1], k.shape[2], v.shape[3]
    wrt = tuple(i for i, need in enumerate(needs) if need and program.captures[i].kind == "float")
    fast = q.dtype == torch.bfloat16
    found = parts(program, wrt, fast, B * H * N * M >= configs.FEW_SCORES, asks(program, wrt, (B, H, N, M)))
    masked = found.masked
    weight, dweight = (None, None) if found.weight is None else (found.weight.value, found.weight.gradient)
    (D0, D1), (V0, V1) = split(D, q.dtype), split(DV, q.dtype)
    whole = D1 == 0 and V1 == 0
    mode = precision(q.dtype)
    floor = max((found.floor + 24) * _LOG2E, -3.4e38)  # base 2; 24 > log(M): no longer sequence is taken
    flags = found.kv_bounds is not None or found.q_bounds is not None
    dims = (D, D0, D1, DV, V0, V1)
    sizes = (B, H, N, M, H // kv_heads)
    kind = traits(found, program, dropout_p, D1 + V1 > 0)
    side = configs.together(B, kind)
    row_grid = tiles_of(N, _ROWS) * B * H

    align, (gs, os) = strides(do, out)
    constants = (
        gs, os, B, H, N, floor, flags, program.inf_rows, program.sink is not None, dropout_p > 0, align,
        DV, max(16, 1 << (DV - 1).bit_length()),
    )  # fmt: skip
    delta = Launch(delta_rows, row_grid, constants, warps=4, stages=1)

    align, (qs, ks, vs, gs) = strides(q, k, v, do)
    dropout = (threshold(dropout_p), keep_scale(dropout_p))
    exact = mode == configs.EXACT_FP32
    apart, apart_full = masked.deep or exact, found.deep or exact
    # a row's base is in the units of both: a tile without its masks cannot have a factor of its own
    whole_tiles = masked if apart_full and found.full.factor != masked.factor else found.full
    deep = None
    used = []  # the tiles that ask for bounds, (rows, keys)
    if apart:
        rows = _EXACT_ROWS if exact else _ROWS
        constants = (
            qs, ks, vs, gs, *sizes, *dropout, -512.0 if found.deep else floor, found.kv_bounds if exact else None,
            masked.score, masked.factor, dweight, found.sink and found.sink.value, exact, dropout_p > 0, align, *dims,
            rows, 32, mode,
        )  # fmt: skip
        deep = Launch(deep_rows, tiles_of(N, rows) * B * H, constants, warps=4, stages=1)
        used += [(rows, 32)] if exact else []

    tile = dkdv_tile or configs.backward_dkdv(N, M, D0 + D1, V0 + V1, q.dtype, kind)
    used.append((tile.block_m, tile.block_n))
    full = whole_tiles if found.q_bounds is not None else masked
    tma = tile.tma and configs.described(N, B * H * N * M) and whole and describable(q, do)
    constants = (
        qs, ks, vs, gs, dk.stride(), dv.stride(), *sizes, *dropout, found.q_bounds,
        masked.score, masked.factor, apart, masked.dscore, masked.dfactor / full.dfactor,
        full.score, full.factor, apart if full is masked else apart_full, full.dscore, full.dfactor, weight, dweight,
        dropout_p > 0, N % tile.block_m == 0, M % tile.block_n == 0, align, *dims, tile.block_m, tile.block_n, mode, tma, side,
    )  # fmt: skip
    dkdv = Launch(dkdv_tiles, tiles_of(M, tile.block_n) * B * kv_heads, constants, tile.warps, tile.stages)
    dkdv_tma = (Blocks(q, tile.block_m, D0), Blocks(do, tile.block_m, V0)) if tma else None

    tile = dq_tile or configs.backward_dq(N, M, D0 + D1, V0 + V1, q.dtype, kind)
    used.append((tile.block_m, tile.block_n))
    full = whole_tiles if found.kv_bounds is not None else masked
    tma = tile.tma and configs.described(M, B * H * N * M) and whole and describable(k, v)
    kept = keep(masked, full, captures, q.dtype, sizes, tile, found.kv_bounds)
    constants = (
        qs, ks, vs, gs, dq.stride(), *sizes, *dropout, found.kv_bounds,
        masked.score, masked.factor, apart, masked.dscore, masked.dfactor / full.dfactor, masked.captures,
        full.score, full.factor, apart if full is masked else apart_full, full.dscore, full.captures, full.dfactor,
        *((None, None, False, False) if kept is None else kept.functions), dweight, found.weight and found.weight.captures,
        dropout_p > 0, N % tile.block_m == 0, M % tile.block_n == 0, align, *dims, tile.block_m, tile.block_n, mode, tma, side,
    )  # fmt: skip
    dq_launch = partial(Launch, dq_tiles, constants=constants, warps=tile.warps, stages=tile.stages)
    programs = tiles_of(N, tile.block_m) * B * H
    if kept is None:
        steps = [Step(0, dq_launch(programs), None)]
    else:
        buffer = dcaptures[kept.table.capture]
        assert buffer is not None
        steps = kept.steps(programs, buffer, dq_launch)
    dq_tma = (Blocks(k, tile.block_n, D0), Blocks(v, tile.block_n, V0)) if tma else None

    tables = []
    for table in masked.tables:
        if kept is not None and table is kept.table:
            continue
        buffer = dcaptures[table.capture]
        assert buffer is not None
        tile = configs.backward_table(N, M, D0 + D1, V0 + V1, q.dtype)
        used.append((tile.block_m, tile.block_n))
        place, offset = table.strides(buffer)
        grid = tiles_of(N, tile.block_m) * tiles_of(M, tile.block_n) * (1 if table.all_b else B) * (1 if table.all_h else H)
        constants = (
            qs, ks, vs, gs, place, offset, *sizes, *dropout, found.kv_bounds, masked.score, masked.factor, apart,
            table.gradient, table.all_b, table.all_h, dweight, dropout_p > 0, align, *dims, tile.block_m, tile.block_n, mode,
        )  # fmt: skip
        tables.append((table.capture, Launch(table_tiles, grid, constants, tile.warps, tile.stages)))
    sink = None
    if found.sink is not None and found.sink.captures is not None:
        constants = (B, H, N, M, found.sink.value, found.sink.captures, masked.factor, apart, _ROWS)
        sink = Launch(sink_rows, row_grid, constants, warps=4, stages=1)
    ranges: KeyRanges | PairRanges | None = None
    if found.pair_mask is not None:
        ranges = PairRanges(found.pair_mask, (B, H, N, M), *map(min, zip(*used, strict=True)), backward=True)
    elif found.key_mask is not None:
        ranges = KeyRanges(program, found.key_mask, (B, H, N, M))
    rows = B * H * N
    scratch = Scratch(
        q.device,
        (torch.float32, 4 * rows),
        (torch.int32, row_grid if flags else 0),
        (torch.float32, rows if deep is not None else 0),
        (torch.float32, 0) if kept is None else kept.scratch(steps),
    )
    return _Plan(
        program, wrt, dropout_p > 0, Place(q.device), scratch, delta, deep, dkdv, dkdv_tma, steps, dq_tma, kept, tables, sink,
        ranges,
    )  # fmt: skip
