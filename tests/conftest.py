"""Every test starts from a fresh Dynamo, with errors inside the pass raised instead of reported."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

os.environ["FUSION_PASS_STRICT"] = "1"
for name in ("FUSION_PASS", "FUSION_PASS_REPORT"):  # a developer's own switches are not the tests'
    os.environ.pop(name, None)
if int(os.environ.get("FUSION_PASS_TEST_GPUS", "1")) > 1:  # test processes gw0, gw1, ... take the devices in turn
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number % int(os.environ["FUSION_PASS_TEST_GPUS"]))

import pytest  # noqa: E402 - the variables above come before torch
import torch  # noqa: E402
from entries import Runs  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code, compile counters or random state of one test in the next; nothing is imported for it."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    """Triton's interpreter, in a process of its own.

    Triton decides when it is imported whether its functions are compiled or interpreted, and other tests of the same pytest
    process may need the compiled ones: what interprets them runs in one worker process, started with TRITON_INTERPRET=1.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # read by the child only: Triton is not imported here because of it
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(int).result()
            yield pool
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Replaces the pass by one that changes nothing and counts, so that only the way in is under test."""
    from fusion_pass import pipeline

    counter = Runs()
    monkeypatch.setattr(pipeline, "run_pass", counter)
    return counter


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are for `make test-gpu`: they are left out, not skipped, where there is no device."""
    if torch.cuda.is_available():
        return
    items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
