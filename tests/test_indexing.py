"""Index expressions: quotients and rests of numbers are numbers, so that a sign can be read off them."""

from __future__ import annotations

import sympy

from fusion_pass.indexing import Div, Mod

X = sympy.Symbol("x", integer=True, nonnegative=True)


def test_quotients_and_rests_of_numbers() -> None:
    assert (Div(7, 2), Mod(7, 2)) == (3, 1)
    assert (1 - Mod(3, 2) >= 0) == sympy.true  # gemma3n's local attention came to ask that


def test_of_axes_they_stay() -> None:
    assert Div(X, 2).func is Div and Mod(X, 2).func is Mod
    assert (Div(X, 2).subs(X, 7), Mod(X, 3).subs(X, 7)) == (3, 1)
