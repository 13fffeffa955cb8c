"""What a score program proves about its mask: which keys a tile of queries can skip, and where no mask is needed.

`masks` says when an element is dead, `ranges` where in a tile that can (or must) be so; both know no tensor's value. Causal,
sliding window, prefix, chunked and block-diagonal masks are instances, not cases. What tensors say about whole keys (padding)
is known only when they are: `key_mask` is the question, `key_ranges` asks it once a call, and its answer narrows the bounds.

A skipped element is worth exactly 0 while its row has a visited score of at least ``fill + 128``, because
exp(-128) < 2^-149 / 2 rounds to zero in fp32 (with the sum at least 1). A row without one has to visit every key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from .masks import Split, key_split, split
from .program import Node, Program, apply, const, size
from .ranges import Solver

__all__ = ["Bounds", "fill", "full_program", "key_mask", "kv_bounds", "no_bounds", "q_bounds"]


@dataclass(frozen=True)
class Bounds:
    """Half-open ranges for a tile, as integer expressions; not clamped to the sequence, possibly empty (hi <= lo).

    Outside [lo, hi) every element is dead for every row of the tile. Inside [full_lo, full_hi) every element is alive as
    far as structure goes: `full_program` gives its score.
    """

    lo: Node
    hi: Node
    full_lo: Node
    full_hi: Node


def _bounds(program: Program, over: str, tile: str) -> Bounds | None:
    parts = split(program.root)
    if parts is None:
        return None
    solver = Solver(over, tile)
    alive = apply("not", parts.dead)
    some, every = solver.solve(alive, some=True), solver.solve(alive, some=False)
    if some == solver.all and every == solver.none:
        return None
    return Bounds(some.lo, some.hi, every.lo, every.hi)


@lru_cache(maxsize=1024)
def kv_bounds(program: Program) -> Bounds | None:
    """The keys that rows q0..q1 (first and last of a query tile, inclusive) can reach; None: nothing is known.

    Reads the indices ``q0 q1 b h``, sizes and parameters.
    """
    return _bounds(program, "k", "q")


@lru_cache(maxsize=1024)
def q_bounds(program: Program) -> Bounds | None:
    """The query rows that keys k0..k1 (first and last of a key tile, inclusive) can be reached from; None: nothing is known.

    Reads the indices ``k0 k1 b h``, sizes and parameters.
    """
    return _bounds(program, "q", "k")


@lru_cache(maxsize=1024)
def key_mask(program: Program) -> Node | None:
    """Whether a key is alive as far as tensors decide it for all queries at once: a bool of b, h and k; None: they do not.

    A dead key has a score of at most ``fill(program, keys=True)`` for every row that structure lets reach it.
    """
    parts = key_split(_live(program))
    return None if parts is None else apply("not", parts.dead)


def _live(program: Program) -> Node:
    parts = split(program.root)
    return program.root if parts is None else parts.live


def _splits(program: Program, keys: bool) -> list[Split]:
    parts = [split(program.root), key_split(_live(program)) if keys else None]
    return [p for p in parts if p is not None]


def no_bounds(program: Program, over: str) -> Bounds:
    """The bounds over "k" or "q" where none are known: everything may be alive, and is where there is no structure at all."""
    end = size("M" if over == "k" else "N")
    return Bounds(const(0), end, const(0), end if split(program.root) is None else const(0))


@lru_cache(maxsize=1024)
def full_program(program: Program, keys: bool = False) -> Program:
    """The score where every structural predicate is alive, and with `keys` the `key_mask` too: `program` without these masks."""
    parts = _splits(program, keys)
    return program.with_root(parts[-1].live) if parts else program


@lru_cache(maxsize=1024)
def fill(program: Program, keys: bool = False) -> float:
    """An upper bound of the score that a skipped element would have; -inf if none is finite (or nothing is skipped).

    keys: whether the keys that `key_mask` finds dead are skipped, too.

    A row may skip while its largest visited score is at least ``fill + 128``. The bound is raised by 2^-10 of its size, so
    that for fills as large as ``finfo.min``, where adding 128 changes nothing, a row that met only masked elements still
    falls below it.
    """
    worst = max((p.fill for p in _splits(program, keys)), default=-math.inf)
    return -math.inf if worst == -math.inf else max(worst, worst * (1 - 2**-10) - 128)
