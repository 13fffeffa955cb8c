"""Two hundred written attention programs, the same ones every time; `make fuzz` (long.py) runs three thousand others."""

from __future__ import annotations

import random

import pytest
import torch
from checks import run

from fuzz.drive import each
from fuzz.judge import check
from fuzz.programs import POINTWISE, programs, write


@pytest.mark.parametrize("seed", range(4))
def test_programs(seed: int) -> None:
    each(programs(), check, seed=seed, count=50)


@pytest.mark.parametrize("function", POINTWISE)
def test_what_a_backward_reads(function: str) -> None:
    """The table says of each function whether torch refuses its backward once the result was edited in place."""
    space = {"torch": torch, "F": torch.nn.functional, "s": torch.linspace(-2, 2, 63, requires_grad=True)}
    result = eval(function, space)
    result.masked_fill_(torch.arange(63) % 2 == 0, float("-inf"))
    if POINTWISE[function]:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()
    else:
        result.sum().backward()


def test_eager_runs_what_is_written() -> None:
    """A program that torch itself refuses judges nothing: the edits in place and the lowest numbers of 10,000 run eagerly."""
    rng = random.Random(0)
    drawn = (write(rng.randbytes(160)) for _ in range(10_000))
    delicate = [w for w in drawn if "masked_fill_(" in w.source or "0.0, torch.finfo(" in w.source]
    assert len(delicate) > 300
    for w in delicate:
        try:
            run(w.build(), w.make())
        except RuntimeError as e:
            raise AssertionError(f"torch refuses a program that was written: {e}\n{w.script}") from e
