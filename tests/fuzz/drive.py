"""How written programs are drawn: by Hypothesis, from a seed alone, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

__all__ = ["each"]


def each(programs: st.SearchStrategy[Any], check: Callable[[Any], None], *, seed: int, count: int, shrink: bool = False) -> None:
    """Call `check` on `count` programs, the same ones for the same seed (and versions of Hypothesis and of the strategy).

    The first failure ends the run. It is raised with its program, whose text runs alone; shrinking it takes minutes.
    """

    @seeded(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        report_multiple_bugs=False,
    )
    @given(programs)
    def examine(program: Any) -> None:
        check(program)

    examine()
