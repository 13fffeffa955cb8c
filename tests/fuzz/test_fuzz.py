"""Two hundred written attention programs, the same ones every time; `make fuzz` (long.py) runs three thousand others."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from fuzz.judge import check
from fuzz.programs import Written, programs


@pytest.mark.fuzz
@settings(max_examples=200, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_programs(program: Written) -> None:
    check(program)
