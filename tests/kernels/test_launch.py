"""From the second call on, plans go to their binaries with addresses: the results, and who is asked."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


def run(what: str, *arguments: Any, **options: Any) -> Any:
    """Runs in the worker."""
    import launch_cases
    import torch

    torch.set_num_threads(1)
    return getattr(launch_cases, what)(*arguments, **options)


@pytest.mark.parametrize("name", ["plain", "causal", "strictly anticausal, -1e9", "bias", "own bias", "documents", "offset"])
def test_the_second_call(worker: ProcessPoolExecutor, name: str) -> None:
    """Grouped heads, flags, deep rows, gradients of captures by each kernel that gathers them, masks of integers, params."""
    assert worker.submit(run, "compare", name, (2, 2, 1, 37, 53, 16, 16)).result() == []


def test_the_second_call_with_dropout(worker: ProcessPoolExecutor) -> None:
    assert worker.submit(run, "compare", "causal", (2, 2, 1, 37, 53, 16, 16), p=0.25).result() == []


def test_the_second_call_with_padding(worker: ProcessPoolExecutor) -> None:
    options = {"n": 37, "m": 129, "kinds": ("right", "left"), "fill": "-inf"}
    assert worker.submit(run, "padded", **options).result() == []


def test_the_second_call_with_documents(worker: ProcessPoolExecutor) -> None:
    options = {"n": 37, "m": 129, "masks": ("documents", "padding"), "fill": "-inf"}
    assert worker.submit(run, "paired", **options).result() == []


def test_through_the_op_and_with_a_profiler(worker: ProcessPoolExecutor) -> None:
    """The forward's kernel and the four of a backward in fp32: directly, but as Triton offers it where somebody listens."""
    assert worker.submit(run, "through_the_op").result() == [["direct", "offered", "direct"]] * 5


def test_a_triton_that_launches_in_another_way(worker: ProcessPoolExecutor) -> None:
    assert set(worker.submit(run, "foreign").result()) == {"offered"}
