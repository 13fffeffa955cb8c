"""Written score programs straight to the Triton kernels: through Triton's interpreter, and on a GPU.

Triton decides at its import whether it interprets: that half runs in a worker process of its own, as in test_triton.py.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from fuzz.drive import each
from fuzz.scores import Scored, scores

PARTS = 16  # of the 320 programs on a GPU: tests of their own, which processes share


def interpreted(program: Scored) -> list[str]:
    """Runs in the worker."""
    from fuzz.kernel_judge import judge

    return judge(program, "cpu")


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # read by the child only
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(int).result()
            yield pool
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@pytest.mark.parametrize("seed", range(2))
def test_interpreted(worker: ProcessPoolExecutor, seed: int) -> None:
    def check(program: Scored) -> None:
        wrong = worker.submit(interpreted, program).result()
        assert not wrong, "\n".join([*wrong, repr(program)])

    each(scores(interpreted=True), check, seed=seed, count=20)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_on_a_gpu(part: int) -> None:
    from fuzz.kernel_judge import judge

    def check(program: Scored) -> None:
        wrong = judge(program, "cuda")
        assert not wrong, "\n".join([*wrong, repr(program)])

    each(scores(interpreted=False), check, seed=part, count=320 // PARTS)
