"""The zoo takes an hour and more: its tests run where they are asked for, with ``-m zoo``."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "zoo" not in str(config.getoption("markexpr")):
        items[:] = [item for item in items if item.get_closest_marker("zoo") is None]
