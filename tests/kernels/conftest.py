"""Triton's interpreter, in a process of its own.

Triton decides when it is imported whether its functions are compiled or interpreted, and other tests of the same pytest
process may need the compiled ones: what interprets them runs in one worker process that is started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
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
