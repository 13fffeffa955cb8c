"""Every environment variable and every option, read in one place.

==================== ============================================= ===========================================
variable             values                                        meaning
==================== ============================================= ===========================================
FUSION_PASS          0 (default), 1, always                        plain ``torch.compile`` fuses attention;
                                                                   ``always``: whatever its size
FUSION_PASS_REPORT   0 (default), 1                                print each graph's report to stderr
FUSION_PASS_STRICT   0 (default), 1                                an error inside the pass is raised instead of
                                                                   reported and left unfused (for tests)
==================== ============================================= ===========================================

A value that is not understood is a warning that names the variable, the value and the choices, and counts as the
default: a typing error in the environment must not stop a training run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Literal, TypeVar, cast

__all__ = ["WHEN", "When", "check_when", "report", "strict", "switch"]

Value = TypeVar("Value")
When = Literal["profitable", "always"]
WHEN: tuple[When, ...] = ("profitable", "always")

_FLAG = {"": False, "0": False, "1": True}
_SWITCH: dict[str, When | None] = {"": None, "0": None, "1": "profitable", "always": "always"}


def switch() -> When | None:
    """What FUSION_PASS asks of plain ``torch.compile``: when to fuse, or None where it is off."""
    return _read("FUSION_PASS", _SWITCH)


def report() -> bool:
    """Whether each compiled graph prints its report to stderr (FUSION_PASS_REPORT)."""
    return _read("FUSION_PASS_REPORT", _FLAG)


def strict() -> bool:
    """Whether an error inside the pass is raised rather than reported (FUSION_PASS_STRICT)."""
    return _read("FUSION_PASS_STRICT", _FLAG)


def check_when(when: str) -> When:
    """`when` itself if it is one of `WHEN`.

    Raises:
        ValueError: it is not; the message names the choices.
    """
    if when not in WHEN:
        raise ValueError(f"fusion_pass: when={when!r} is not known; use one of {', '.join(map(repr, WHEN))}")
    return cast(When, when)


def _read(name: str, choices: Mapping[str, Value]) -> Value:
    raw = os.environ.get(name, "")
    if raw.strip().lower() in choices:
        return choices[raw.strip().lower()]
    allowed = ", ".join(value for value in choices if value)
    warnings.warn(f"fusion_pass: {name}={raw!r} is not understood and counts as 0; use one of {allowed}", stacklevel=3)
    return choices[""]
