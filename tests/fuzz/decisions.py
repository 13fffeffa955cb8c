"""Decisions of a generator of programs, read from bytes: the fewer and smaller the bytes, the simpler the program.

All decisions of an example are one Hypothesis draw. With a draw for each, Hypothesis repeats parts of an example elsewhere in it,
and most of its examples would be a program that it has had before.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

__all__ = ["Decisions", "decisions"]


def decisions(count: int) -> st.SearchStrategy[bytes]:
    """Bytes for `count` decisions; what a program needs beyond them is the simplest choice."""
    return st.binary(min_size=count, max_size=count)


class Decisions:
    """Reads one byte a decision."""

    def __init__(self, source: bytes) -> None:
        self._bytes = iter(source)

    def pick(self, *choices: Any) -> Any:
        """One of the choices (at most 256); the first is the simplest."""
        return choices[next(self._bytes, 0) * len(choices) >> 8]

    def chance(self, percent: int) -> bool:
        """True for about `percent` of a hundred; the simplest program has False."""
        return next(self._bytes, 0) * 100 >= (100 - percent) << 8

    def shuffled(self, length: int) -> tuple[int, ...]:
        """A permutation of 0..length; the simplest is the identity."""
        rest = list(range(length))
        return tuple(rest.pop(self.pick(*range(len(rest)))) for _ in range(length))
