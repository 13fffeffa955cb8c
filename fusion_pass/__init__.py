"""Attention written in plain PyTorch, found by torch.compile and run as one fused op, forward and backward.

Four ways in, one pass: ``backend=flash_backend``, ``backend="flash"``, ``FUSION_PASS=1`` in the environment, and
`enable` in code. `explain` says what was fused, what was not, and why.

Names are imported on first use: importing this package costs nothing and never imports Inductor (the environment
switch runs at the end of every ``import torch``).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .backend import Backend, flash_backend, make_backend
    from .explanation import explain
    from .hook import disable, enable
    from .report import Report, last_report

__version__ = "0.1.0"
__all__ = ["Backend", "Report", "disable", "enable", "explain", "flash_backend", "last_report", "make_backend"]

_HOMES = {
    "Backend": "backend",
    "flash_backend": "backend",
    "make_backend": "backend",
    "explain": "explanation",
    "enable": "hook",
    "disable": "hook",
    "Report": "report",
    "last_report": "report",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fusion_pass' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # this lookup does not come again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
