"""The judge is judged: where NaN and infinities may stand, and when float16 counts as overflowing."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from checks import misplaced, overflow, rounding_errors
from torch import Tensor

# (fused, eager, float64) of one element -> whether it passes: as an output, as a gradient; and both where float16 overflows
RULES = {
    (1.0, 1.0, 1.0): (True, True, True, True),
    (nan, nan, 1.0): (True, True, True, True),
    (nan, 1.0, nan): (False, False, False, False),
    (1.0, nan, 1.0): (False, False, True, True),
    (1.0, inf, nan): (False, False, False, False),
    (inf, -inf, 1.0): (False, False, False, False),
    (inf, nan, 1.0): (False, False, False, False),
    (-inf, nan, -inf): (True, True, True, True),
    (-inf, nan, inf): (False, False, False, False),
    (nan, inf, nan): (False, True, True, True),
    (nan, inf, inf): (False, True, False, True),
    (nan, -inf, 1.0): (False, True, False, True),
    (nan, 1.0, inf): (False, False, False, False),
}


@pytest.mark.parametrize("values", RULES, ids=str)
def test_where_nan_and_infinities_may_stand(values: tuple[float, float, float]) -> None:
    fused, eager, exact = (torch.tensor([[0.0, x]]) for x in values)
    cases = [(name, overflows) for overflows in (False, True) for name in ("output 0", "gradient 0")]
    assert tuple(not misplaced(name, fused, eager, exact, overflows) for name, overflows in cases) == RULES[values]


def test_what_is_misplaced_is_said() -> None:
    fused, eager = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, inf], [nan, 0.0, 0.0]])
    assert misplaced("output 0", fused, eager, eager, False) == "a number at [0, 2], eager has inf (2 such places)"


@pytest.mark.parametrize(
    ("fn", "seen"),
    [
        (lambda x: x * 300, True),
        (lambda x: (x @ x) * 0.25, True),
        (lambda x: x.clone().mul_(300), True),
        (lambda x: x.sum() * 0.01, True),
        (lambda x: x * 2, False),
        (lambda x: x.float() * 300, False),
        (lambda x: (x.float() * 300).half(), False),  # a cast
        (lambda x: x.masked_fill(x > 0, -inf).amax(), False),
        (lambda x: torch.nn.functional.dropout(x, 0.5), False),
        (lambda x: x / torch.zeros_like(x), False),  # infinite in fp32 too
        (lambda x: x * 0 * 300 * 300, True),  # in the backward
    ],
)
def test_overflow_is_arithmetic_in_float16(fn: Callable[[Tensor], Tensor], seen: bool) -> None:
    x: Tensor = torch.full((32, 32), 250.0, dtype=torch.float16, requires_grad=True)
    assert overflow(fn, [x]) == seen


def test_what_float64_is_likely_wrong_by() -> None:
    """Of a sum that `math.fsum` gives exactly: within a factor of 30 either way, over draws."""

    def total(x: Tensor) -> Tensor:
        return x.double().cumsum(0)[-1:].masked_fill(torch.zeros(1, dtype=torch.bool), torch.finfo(torch.float64).min)

    seen, guessed = 0.0, 0.0
    for i in range(8):
        x = torch.randn(4000, generator=torch.Generator().manual_seed(i), dtype=torch.float64).requires_grad_()
        seen = max(seen, abs(total(x).item() - math.fsum(x.tolist())))
        output, gradient = rounding_errors(total, [x])
        guessed = max(guessed, output)
        assert gradient == 0.0
    assert seen / 30 < guessed < 30 * seen
