"""Which implementation runs a call.

"cudnn"   ATen's cuDNN attention: plain and causal programs in 16 bits on Hopper and later
"triton"  the portable kernels: everything else on a GPU
"aten"    ATen's flash attention on CPU, forward, where it can say the program
"tiled"   everything else on CPU, in torch
"dense"   the N x M reference; only when it is forced
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from . import configs, cpu, cudnn
from .keys import allows_tf32
from .program import Program
from .sdpa import form

__all__ = ["choose", "force", "kernel_for", "state", "trouble"]

IMPLEMENTATIONS = ("triton", "cudnn", "aten", "tiled", "dense")
_forced: str | None = None


@contextmanager
def force(implementation: str) -> Iterator[None]:
    """Runs every call inside with one implementation, forward and backward, in all threads; for tests and measurements.

    Args:
        implementation: "triton" (on CPU tensors through Triton's interpreter, which TRITON_INTERPRET=1 turns on before
            Triton is imported), "cudnn", "aten", "tiled" or "dense".

    Raises:
        ValueError: the name is none of these.
    """
    global _forced
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"fusion_kernels: no implementation {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def _interpreting() -> bool:
    return os.environ.get("FUSION_KERNELS_INTERPRET", "0") not in ("", "0")


def kernel_for(
    device: torch.device | str,
    dtype: torch.dtype,
    v_dtype: torch.dtype,
    program: Program,
    dropout_p: float = 0.0,
    *,
    same_head_dim: bool = True,
    backward: bool = False,
    capture_grads: bool = False,
) -> str:
    """The implementation that a call would run: "cudnn", "triton", "aten-cpu" or "tiled" ("dense" only when forced).

    Single calls may still go another way, for reasons that only their tensors show (strides, a mask that hides every key).

    Args:
        device: of all tensors. dtype: of q and k. v_dtype: of v.
        same_head_dim: whether v's head dim is q's.
        backward: name what runs the backward; the forward otherwise.
        capture_grads: whether a captured tensor needs a gradient, which the forward does not ask.
    """
    device = torch.device(device)
    if _forced is not None:
        return {"aten": "aten-cpu"}.get(_forced, _forced) if not _unable(backward, capture_grads) else _other(device)
    plain = same_head_dim and v_dtype == dtype and not dropout_p
    if device.type != "cpu" or _interpreting():
        fits = plain and dtype in cudnn.HALVES and cudnn.expresses(program) and cudnn.available(device)
        return "cudnn" if fits else "triton"
    return "aten-cpu" if plain and form(program) is not None and not backward else "tiled"


def _unable(backward: bool, capture_grads: bool) -> bool:
    """Whether the forced implementation has no backward, or none for a capture that needs a gradient."""
    return backward and (_forced == "aten" or (_forced == "cudnn" and capture_grads))


def _other(device: torch.device) -> str:
    """What takes the backward that the forced implementation is unable to do."""
    return "tiled" if device.type == "cpu" else "triton"


def trouble(device: torch.device) -> tuple[str, str] | None:
    """What was seen and what is needed, where no implementation can be trusted to run on this device; else None."""
    if device.type == "cpu":
        return None
    if find_spec("triton") is None:
        return "no Triton", "Triton 3.6 or later: pip install triton"
    from . import assembler

    return assembler.trouble(device)


def state(dtype: torch.dtype) -> tuple[object, ...]:
    """What decides how a call with q of this dtype is run, beside its arguments: what the user has set."""
    tf32 = dtype == torch.float32 and allows_tf32()
    settings = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    return _forced, *settings, tf32, configs.asking()


def choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    program: Program,
    dropout_p: float,
    needs: Sequence[bool] | None,
) -> str:
    """The implementation of one call, forward (`needs` is None) or backward (which captures need a gradient)."""
    if _forced is not None:
        return _other(q.device) if _unable(needs is not None, any(needs or ())) else _forced
    if q.device.type != "cpu" or _interpreting():
        return "cudnn" if cudnn.supports(q, k, v, program, dropout_p) and cudnn.available(q.device) else "triton"
    return "aten" if needs is None and cpu.supports(q, k, v, captures, program, dropout_p) else "tiled"
