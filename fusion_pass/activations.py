"""Activation functions of a score: each as an expression whose gradient is ATen's, at its kinks as well.

A function takes the score as a float node and the other arguments of the ATen call under their own names. Two things make the
gradient right. At a kink the branch that holds the point is the one that ATen differentiates there: ``x <= 0`` and ``x < 0`` give
the same value and another gradient. And a branch that is not taken must be finite all the same, for 0 times the derivative of
``exp(1e4)`` is NaN; so its argument is held where it is harmless.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fusion_kernels.program import Node, apply, const

from .kinds import scalar, to_float

__all__ = ["ACTIVATIONS"]

ZERO, ONE = const(0.0), const(1.0)


def _number(x: Any) -> Node:
    return to_float(x if isinstance(x, Node) else scalar(x))


def _where(p: Node, a: Node, b: Node) -> Node:
    return apply("where", p, a, b)


def _relu(x: Node) -> Node:
    """max(x, 0); the gradient at 0 is 0, and NaN stays."""
    return _where(apply("le", x, ZERO), ZERO, x)


def _threshold(x: Node, threshold: Any, value: Any) -> Node:
    """x above the threshold, else the value: no gradient at the threshold."""
    return _where(apply("le", x, _number(threshold)), _number(value), x)


def _hardtanh(x: Node, min_val: Any = -1.0, max_val: Any = 1.0) -> Node:
    """min(max(x, a), b) as clamp, but the gradient is 1 in the open interval a < x < b, where clamp's is 1 at a and b too.

    A NaN is in no part of ATen's ``x <= a or x >= b ? 0 : g``, so g passes (on CPU only in what its vectors leave over).
    """
    low, high = _number(min_val), _number(max_val)
    return _where(apply("ge", x, high), high, _where(apply("le", x, low), low, x))


def _hardsigmoid(x: Node) -> Node:
    """(x + 3) / 6 between 0 and 1: the gradient is 1/6 where -3 < x < 3, 0 elsewhere and at NaN."""
    inside = apply("and", apply("gt", x, const(-3.0)), apply("lt", x, const(3.0)))
    outside = _where(apply("ge", x, const(3.0)), ONE, _where(apply("le", x, const(-3.0)), ZERO, const(math.nan)))
    return _where(inside, apply("div", apply("add", x, const(3.0)), const(6.0)), outside)


def _leaky_relu(x: Node, negative_slope: Any = 0.01) -> Node:
    """x where x > 0, else slope x: the gradient at 0 is the slope."""
    return _where(apply("gt", x, ZERO), x, apply("mul", x, _number(negative_slope)))


def _elu(x: Node, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> Node:
    """scale x where x > 0, else scale alpha (e^(input_scale x) - 1): the gradient at 0 is scale alpha input_scale."""
    negative = apply("le", x, ZERO)
    held = apply("mul", _where(negative, x, ZERO), _number(input_scale))
    below = apply("mul", apply("expm1", held), apply("mul", _number(alpha), _number(scale)))
    return _where(negative, below, apply("mul", x, _number(scale)))


def _celu(x: Node, alpha: Any = 1.0) -> Node:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1))."""
    return _elu(x, alpha, 1.0, apply("div", ONE, _number(alpha)))


def _log_sigmoid(x: Node) -> Node:
    """log(1 / (1 + e^-x)) = min(x, 0) - log(1 + e^-|x|): the gradient at 0 is 1/2, from the tie in min alone."""
    tail = apply("log1p", apply("exp", apply("neg", apply("abs", x))))
    return apply("sub", apply("minimum", x, ZERO), tail)


def _softplus(x: Node, beta: Any = 1.0, threshold: Any = 20.0) -> Node:
    """log(1 + e^(beta x)) / beta, and x itself above the threshold of beta x."""
    scaled = apply("mul", x, _number(beta))
    linear = apply("gt", scaled, _number(threshold))
    soft = apply("div", apply("log1p", apply("exp", _where(linear, ZERO, scaled))), _number(beta))
    return _where(linear, x, soft)


def _silu(x: Node) -> Node:
    return apply("mul", x, apply("sigmoid", x))


def _gelu(x: Node, approximate: str = "none") -> Node:
    """x/2 (1 + erf(x / sqrt 2)), or x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    half = apply("mul", x, const(0.5))
    if approximate == "none":
        return apply("mul", half, apply("add", apply("erf", apply("mul", x, const(math.sqrt(0.5)))), ONE))
    cubic = apply("mul", apply("mul", x, apply("mul", x, x)), const(0.044715))
    inner = apply("mul", apply("add", x, cubic), const(math.sqrt(2 / math.pi)))
    return apply("mul", half, apply("add", apply("tanh", inner), ONE))


ACTIVATIONS: dict[str, Callable[..., Node]] = {
    "relu": _relu,
    "threshold": _threshold,
    "hardtanh": _hardtanh,  # relu6 is one from 0 to 6
    "hardsigmoid": _hardsigmoid,
    "leaky_relu": _leaky_relu,
    "_prelu_kernel": _leaky_relu,  # the slope is a tensor
    "elu": _elu,  # selu is one
    "celu": _celu,
    "log_sigmoid_forward": _log_sigmoid,
    "softplus": _softplus,
    "silu": _silu,
    "gelu": _gelu,
}
