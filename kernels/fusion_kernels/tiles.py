"""What a score program proves about its mask: which keys a tile of queries can skip, and where no mask is needed.

`masks` says when an element is dead, `ranges` where in a tile that can (or must) be so; both know no tensor's value. Causal,
sliding window, prefix, chunked and block-diagonal masks are instances, not cases. What tensors say about whole keys (padding)
is known only when they are: `key_mask` is the question, `key_ranges` asks it once a call, and its answer narrows the bounds.
What they say about pairs of a query and a key (documents, ready-made masks) is `pair_mask`, asked by `pair_ranges` together with
all the rest: its answer takes the place of the bounds.

A skipped element is worth exactly 0 while its row has a visited score of at least ``fill + 128``, because
exp(-128) < 2^-149 / 2 rounds to zero in fp32 (with the sum at least 1). A row without one has to visit every key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

from .masks import Split, key_split, pair_split, split
from .program import Node, Program, apply, const, size
from .ranges import Solver

__all__ = ["Bounds", "PairMask", "fill", "full_program", "key_mask", "kv_bounds", "no_bounds", "pair_mask", "q_bounds"]


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


@dataclass(frozen=True)
class PairMask:
    """Bools of b, h, q and k. An element that is not alive has a score of at most ``fill(program, pairs=True)``."""

    alive: Node
    plain: Node  # alive, and the score is that of ``full_program(program, pairs=True)``
    graded: bool  # whether there is something between: a number is added that may be neither 0 nor a mask

    def depends_on(self, index: str) -> bool:
        return self.alive.depends_on(index) or self.plain.depends_on(index)


@lru_cache(maxsize=1024)
def pair_mask(program: Program, learned: tuple[int, ...] = ()) -> PairMask | None:
    """Which elements are alive as far as structure and tensors know; None: tensors decide at most about whole keys.

    learned: the captures whose gradients are wanted; a mask that is added is none of them.
    """
    found = _splits(program, keys=True)
    last = pair_split(found[-1].live if found else program.root, learned)
    if last is None:
        return None
    alive = plain = const(True)
    for part in (*found, last):
        alive, plain = apply("and", alive, apply("not", part.dead)), apply("and", plain, part.plain)
    return PairMask(alive, plain, last.graded)


def _splits(program: Program, keys: bool = False, pairs: bool = False, learned: tuple[int, ...] = ()) -> list[Split]:
    """By structure, by what hides whole keys, by all that tensors say: each of what the one before leaves alive."""
    found: list[Split] = []
    steps = [split, *([key_split] if keys or pairs else []), *([partial(pair_split, learned=learned)] if pairs else [])]
    for step in steps:
        part = step(found[-1].live if found else program.root)
        if part is not None:
            found.append(part)
    return found


def no_bounds(program: Program, over: str) -> Bounds:
    """The bounds over "k" or "q" where none are known: everything may be alive, and is where there is no structure at all."""
    end = size("M" if over == "k" else "N")
    return Bounds(const(0), end, const(0), end if split(program.root) is None else const(0))


@lru_cache(maxsize=1024)
def full_program(program: Program, keys: bool = False, pairs: bool = False, learned: tuple[int, ...] = ()) -> Program:
    """`program` without its masks: the score where every structural predicate is alive, with `keys` the `key_mask` too, and
    with `pairs` where the `pair_mask` of `learned` is plain."""
    parts = _splits(program, keys, pairs, learned)
    return program.with_root(parts[-1].live) if parts else program


@lru_cache(maxsize=1024)
def fill(program: Program, keys: bool = False, pairs: bool = False, learned: tuple[int, ...] = ()) -> float:
    """An upper bound of the score that a skipped element would have; -inf if none is finite (or nothing is skipped).

    keys: whether the keys that `key_mask` finds dead are skipped, too. pairs: and what `pair_mask` of `learned` does.

    A row may skip while its largest visited score is at least ``fill + 128``. The bound is raised by 2^-10 of its size, so
    that for fills as large as ``finfo.min``, where adding 128 changes nothing, a row that met only masked elements still
    falls below it.
    """
    worst = max((p.fill for p in _splits(program, keys, pairs, learned)), default=-math.inf)
    return -math.inf if worst == -math.inf else max(worst, worst * (1 - 2**-10) - 128)
