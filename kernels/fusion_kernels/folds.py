"""Constants of a score program, computed: what an operation makes of numbers. This file knows numbers alone, no nodes.

`FOLDS` is plain Python arithmetic, in double precision.  `exact` is for decisions: it gives a value only where fp32 and fp64
agree on it, so that a program has the same values with it as without, whichever of the two evaluates it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

__all__ = ["FOLDS", "exact"]

Number = float | int | bool
LARGEST_INT = 2**31  # kernels have 32 bits for integers


def _cast(code: str, x: float) -> float:
    """`x` in a narrower format, and back."""
    if math.isinf(x) or math.isnan(x):
        return x
    try:
        return struct.unpack(code, struct.pack(code, x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def _f16(x: float) -> float:
    return _cast("e", x)


def _f32(x: float) -> float:
    return _cast("f", x)


def _bf16(x: float) -> float:
    x = _f32(x)
    if math.isinf(x) or math.isnan(x):
        return x
    bits = struct.unpack("I", struct.pack("f", x))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("f", struct.pack("I", bits & 0xFFFFFFFF))[0]


def _at(**values: float) -> Callable[[float], float]:
    """A function by its exact values; ValueError elsewhere, where libraries differ in the last bit. Its zeros keep no sign."""
    table = {float(name): value for name, value in values.items()}

    def at(x: float) -> float:
        if x != x:
            return x
        if x not in table:
            raise ValueError(f"no exact value at {x}")
        return table[x]

    return at


def _whole(rounding: Callable[[float], int]) -> Callable[[float], float]:
    return lambda x: math.copysign(rounding(x), x) if math.isfinite(x) else x


FOLDS: dict[str, Callable[..., Number]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "maximum": lambda a, b: a if a > b or a != a else b,  # NaN wins
    "minimum": lambda a, b: a if a < b or a != a else b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "xor": lambda a, b: a != b,
    "not": lambda a: not a,
    "isnan": lambda a: a != a,
    "isinf": math.isinf,
    "to_float": float,
    "to_int": int,
    "to_bool": lambda a: a != 0,
    "sqrt": math.sqrt,
    "floor": _whole(math.floor),
    "ceil": _whole(math.ceil),
    "trunc": _whole(math.trunc),
    "exp": _at(**{"-inf": 0.0, "0": 1.0, "inf": math.inf}),
    "log": _at(**{"0": -math.inf, "1": 0.0, "inf": math.inf}),
    "round_float16": _f16,
    "round_bfloat16": _bf16,
}


def exact(op: str, values: Sequence[Number]) -> Number | None:
    """``op(*values)`` if the operation gives it in fp32, where each value is rounded before and after, as well; else None."""
    if op not in FOLDS:
        return None
    try:
        wide = FOLDS[op](*values)
        narrow = FOLDS[op](*(_f32(v) if isinstance(v, float) else v for v in values))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    if op in ("maximum", "minimum") and len({math.copysign(1, v) for v in values if _f32(v) == 0}) == 2:
        return None  # of 0 and -0
    if op == "sqrt" and math.isfinite(wide) and Fraction(wide) ** 2 != values[0]:
        return None  # a root with more digits: torch's own on a CPU is one bit off in fp32, of 136 say
    if isinstance(wide, float):
        return wide if _same(_f32(wide), _f32(narrow)) and math.isinf(_f32(wide)) == math.isinf(wide) else None
    small = isinstance(wide, bool) or abs(wide) < LARGEST_INT
    return wide if small and wide == narrow else None


def _same(a: float, b: float) -> bool:
    """Whether two numbers are one, NaN and the sign of 0 included."""
    return a != a and b != b or a == b and math.copysign(1, a) == math.copysign(1, b)
