"""``fusion_pass.explain(model, ...)``: compile the model as torch.compile would, and say what happened to its attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

from . import report
from .report import Report

__all__ = ["explain"]


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Report:
    """Compile and run ``model(*args, **kwargs)`` with `flash_backend`, print the report and return it.

    This is the real path: the same graphs, the same pass and the same compiler as ``torch.compile``, in the model's
    present mode (``train`` or ``eval``) and under the caller's ``no_grad`` and autocast. The inputs are copied, and the
    buffers of the model and the random state are put back, so that nothing of the caller's is changed; gradients are
    never computed. Compiled code of the process is dropped (``torch._dynamo.reset``) and is compiled again when it is
    next called.

    Args:
        model: a module or a function, compiled already or not.
        *args, **kwargs: what to call it with.

    Returns:
        The report, also at `fusion_pass.last_report`.

    Raises:
        What the call itself raises.
    """
    from .backend import flash_backend

    plain = _uncompiled(model)
    torch._dynamo.reset()
    try:
        with report.collect() as result, _kept_state(plain):
            torch.compile(plain, backend=flash_backend)(*tree_map(_copied, args), **tree_map(_copied, kwargs))
    finally:
        torch._dynamo.reset()
    result.show()
    return result


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """What the user wrote, under however many torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
        if inner is None:
            return model
        model = inner


@contextmanager
def _kept_state(model: Callable[..., Any]) -> Iterator[None]:
    """Random state and buffers (running statistics, caches) after as before."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    buffers = [(m._buffers, name, b, b.detach().clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for home, name, buffer, value in buffers:
                home[name] = buffer
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)


def _copied(value: Any) -> Any:
    """A copy that the call may change: tensors by value, other objects deeply where that is possible."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(value)
    except Exception:
        return value
