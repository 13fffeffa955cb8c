"""The attention forward in portable Triton: one program per (batch, head, tile of queries), an online softmax over key tiles.

The key tiles come in up to three groups, each a loop of its own body or trip count:
  full     every structural predicate is live and no key is padding or past the end: the score is `full_program`'s;
  masked   the rest of what the mask lets through;
  skipped  only for rows in which nothing finite was met, when the mask's fill is finite (such a row averages over all keys).

The row maximum is carried in the units of the score; 2^(x * log2(e) - max * log2(e)) is one fused multiply-add and one exp2,
and a constant factor at the root of the program is folded into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import codegen, configs
from .arguments import Blocks, check, describable, parts, precision, split, strides, tiles_of, traits
from .blanks import Place
from .dropout import keep_scale, threshold
from .forward_kernels import forward_tiles
from .key_ranges import KeyRanges
from .keys import Plans, allows_tf32, number, signature
from .launch import Launch
from .pair_ranges import PairRanges, asks
from .program import Program

__all__ = ["attention_forward", "plan"]

Fill = Callable[..., None]  # (q, k, v, captures, params, seed, out, lse) -> fills the last two


def attention_forward(
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
    tile: configs.Tile | None = None,
) -> None:
    """Fills `out` (B, H, N, Dv), any strides, and `lse` (B, H, N), fp32, contiguous, base 2.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv); any strides, fp32, fp16 or bf16.
        captures, params: what the program reads.
        dropout_p: probability of dropping; seed: 0-d int64 on the device, needed if dropout_p > 0.
        tile: overrides the measured choice of `configs`.

    Raises:
        TypeError, ValueError: a dtype, head dim or length that these kernels do not take.
    """
    look = signature(q, k, v, seed, out, *captures)
    key = (id(program), dropout_p, look, tuple(map(number, params)), tile, allows_tf32(), configs.asking())
    fill = _plans.get(key)
    if fill is None:
        fill = _plans[key] = plan(q, k, v, captures, program, dropout_p, out, tile)
    with Place(q.device).entered():
        fill(q, k, v, captures, params, seed, out, lse)


_plans: dict[Any, Fill] = Plans()


@dataclass(frozen=True)
class _Plan:
    """The launch of one kind of call. The current device has to be that of `place`."""

    program: Program  # held, so that the id in a key stays its own
    dropout: bool
    place: Place
    launch: Launch
    tma: tuple[Blocks, Blocks] | None  # of k and v, where they go through the copy engine
    ranges: KeyRanges | PairRanges | None  # asks what tensors hide

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor], params: Sequence[int],
        seed: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    ) -> None:  # fmt: skip
        stream, of = self.place.stream(), self.launch.of
        seed = seed if self.dropout else None
        keys, values = (self.tma[0].of(k), self.tma[1].of(v)) if self.tma else (of(k), of(v))
        aux = codegen.aux_arguments(self.program, captures, params, of)
        if self.ranges is not None:
            aux = self.ranges(aux, q.device, stream)
        self.launch(stream, of(q), keys, values, of(out), of(lse), None if seed is None else of(seed), aux)


def _nothing(*arguments: Any) -> None:
    """For no queries or no values."""


def _no_keys(*arguments: Any) -> None:
    """Sums of nothing."""
    *_, out, lse = arguments
    out.zero_()
    lse.fill_(-math.inf)


def plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Sequence[torch.Tensor], program: Program, dropout_p: float,
    out: torch.Tensor, tile: configs.Tile | None = None,
) -> Fill:  # fmt: skip
    """What `attention_forward` does, on q's device, for every call that looks like this one (`out` may have no memory)."""
    if out.numel() == 0:
        return _nothing
    if k.shape[2] == 0:
        return _no_keys
    check(q, k, v)
    B, H, N, D = q.shape
    M, DV = k.shape[2], v.shape[3]
    sizes = (B, H, N, M)
    fast = q.dtype == torch.bfloat16
    found = parts(program, (), fast, B * H * N * M >= configs.FEW_SCORES, asks(program, (), sizes))
    masked = found.masked
    full = found.full if found.kv_bounds is not None else masked
    (D0, D1), (V0, V1) = split(D, q.dtype), split(DV, q.dtype)
    kind = traits(found, program, dropout_p, D1 + V1 > 0)
    tile = tile or configs.forward(N, M, D0 + D1, V0 + V1, q.dtype, kind)
    align, (qs, ks, vs, os) = strides(q, k, v, out)
    tma = tile.tma and configs.described(M, B * H * N * M) and D1 == 0 and V1 == 0 and describable(k, v)
    constants = (
        qs, ks, vs, os, B, H, N, M, H // k.shape[1], threshold(dropout_p), keep_scale(dropout_p), found.floor,
        found.kv_bounds, masked.score, masked.factor, masked.wide, full.score, full.factor, full.wide,
        found.revisit, found.sink and found.sink.value, program.zero_rows, program.inf_rows,
        found.weight and found.weight.value, program.selects, dropout_p > 0,
        N % tile.block_m == 0, M % tile.block_n == 0, align,
        D, D0, D1, DV, V0, V1, tile.block_m, tile.block_n, precision(q.dtype), tma, configs.together(B, kind),
    )  # fmt: skip
    launch = Launch(forward_tiles, tiles_of(N, tile.block_m) * B * H, constants, tile.warps, tile.stages)
    ranges: KeyRanges | PairRanges | None = None
    if found.pair_mask is not None:
        ranges = PairRanges(found.pair_mask, sizes, tile.block_m, tile.block_n, backward=False)
    elif found.key_mask is not None:
        ranges = KeyRanges(program, found.key_mask, sizes)
    blocks = (Blocks(k, tile.block_n, D0), Blocks(v, tile.block_n, V0)) if tma else None
    return _Plan(program, dropout_p > 0, Place(q.device), launch, blocks, ranges)
