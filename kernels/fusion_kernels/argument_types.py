"""Arguments of the public function that are not what their annotations say: each message names the argument and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import SymFloat, SymInt, Tensor

from .program import Program

__all__ = ["check_types"]

INTS = (int, Integral, SymInt)  # a compiler that traces calls passes symbols
REALS = (float, Real, SymInt, SymFloat)


def check_types(
    q: Any, k: Any, v: Any, scale: Any, causal: Any, window: Any, bias: Any, mask: Any, softcap: Any, sink: Any, dropout_p: Any,
    seed: Any, program: Any, captures: Any, params: Any,
) -> None:  # fmt: skip
    """Of ``fusion_kernels.attention``.

    Raises:
        TypeError: an argument has another type than its annotation.
        ValueError: a seed of more than 64 bits.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise _wrong(name, t, "a torch.Tensor")
    for name, t in (("bias", bias), ("mask", mask), ("sink", sink)):
        if t is not None and not isinstance(t, Tensor):
            raise _wrong(name, t, f"a torch.Tensor (torch.as_tensor({name}) makes one of numbers and arrays), or None")
    if scale is not None and not isinstance(scale, (*REALS, Tensor)):
        raise _wrong("scale", scale, "a number, or a floating-point tensor of one element, which has a gradient")
    if softcap is not None and not isinstance(softcap, REALS):
        raise _wrong("softcap", softcap, "a number (softcap.item() of a tensor: it gets no gradient)")
    if not isinstance(dropout_p, REALS):
        raise _wrong("dropout_p", dropout_p, "a number from 0 to 1")
    if window is not None and (isinstance(window, bool) or not isinstance(window, INTS)):
        raise _wrong("window", window, "an int, the number of keys that a query sees to a side, its own position included")
    if not isinstance(causal, INTS):
        raise _wrong("causal", causal, "True or False")
    if seed is not None and not isinstance(seed, Tensor):
        if not isinstance(seed, INTS):
            raise _wrong("seed", seed, "an int, or a 0-d int64 tensor")
        if not -(2**63) <= int(seed) < 2**63:
            raise ValueError(f"fusion_kernels: seed is {seed}; needed: an int of 64 bits, from -2**63 to 2**63 - 1")
    if program is not None and not isinstance(program, (Program, str)):
        raise _wrong("program", program, "a fusion_kernels.Program, or the text of one")
    _check_list("captures", captures, Tensor, "tensors")
    _check_list("params", params, INTS, "ints")


def _check_list(name: str, values: Any, kind: type | tuple[type, ...], kinds: str) -> None:
    if isinstance(values, (str, Tensor)) or not isinstance(values, Sequence):
        raise _wrong(name, values, f"a list or tuple of {kinds}")
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise _wrong(f"{name}[{i}]", value, f"{name} to be {kinds}")


def _wrong(name: str, value: Any, needed: str) -> TypeError:
    text = "" if isinstance(value, Tensor) else repr(value)
    seen = "None" if value is None else f"{text} ({type(value).__name__})" if 0 < len(text) <= 40 else f"a {type(value).__name__}"
    return TypeError(f"fusion_kernels: {name} is {seen}; needed: {needed}")
