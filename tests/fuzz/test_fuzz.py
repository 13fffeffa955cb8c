"""Two hundred written attention programs, the same ones every time; `make fuzz` (long.py) runs three thousand others."""

from __future__ import annotations

import pytest

from fuzz.drive import each
from fuzz.judge import check
from fuzz.programs import programs


@pytest.mark.parametrize("seed", range(4))
def test_programs(seed: int) -> None:
    each(programs(), check, seed=seed, count=50)
