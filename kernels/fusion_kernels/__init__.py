"""Attention with any pointwise score, forward and backward, as one PyTorch op: ``fusion_kernels.attention(q, k, v, ...)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import attention as attention
    from .program import Program as Program
    from .program import parse as parse

__all__ = ["Program", "__version__", "attention", "parse"]

__version__ = "0.1.0"

_HOMES = {"attention": "api", "Program": "program", "parse": "program"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
