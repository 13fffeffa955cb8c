"""cuDNN's attention on Hopper and later, where it computes exactly what a program says: ``softmax(scale * s) v``, causal or not.

It is what torch.compile runs for the attention that it knows by heart, and faster than portable Triton: 1.04 to 1.36 times
forward and 1.1 to 1.35 times backward at N = 2048 and above (one H200, bf16, D = 64 and 128). Everything else about a site (a
mask that is not causal, a bias, dropout, fp32, a gradient that has to be deterministic) stays with the Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .program import Program
from .sdpa import form

__all__ = ["attention_backward", "attention_forward", "available", "expresses", "fits", "supports"]

LN2 = math.log(2.0)
LOG2E = math.log2(math.e)
HALVES = (torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 256
# Rows that hold nothing but -inf are zeros in cuDNN and NaN in eager. With no mask but the causal one such a row needs an
# infinite q or k whose every product is -inf; with this many keys that takes a column of k without one negative element.
FEWEST_KEYS = 64
# Lengths that are no multiple of 128 need a fix of 9.15.1. torch's own choice asks for a version above 9.15.0 as well, and its
# wheels for CUDA 12 come with an older one (pytorch#169849, #171627; `check_prefer_cudnn_attention` in torch's sdp_utils.cpp).
OLDEST = 91501
# Hopper's backward reads half a tile of keys too many where the last of its tiles of 128 is half full, and no causal mask hides
# it: dq is NaN for rows whose log-sum-exp is below -88.7 (pytorch#196678; seen under 9.19 at M = 64, 192, 320 and 704, D = 40 to
# 192). From 9.25 on a single query has NaN in dk and dv as well (cudnn-frontend#1072).
TILE = 128
LARGEST_BATCH = 65535  # of batch and of heads, each: from 65536 on the call fails (pytorch#181085, #180718)

aten = torch.ops.aten


@lru_cache(maxsize=64)
def _hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


@lru_cache(maxsize=1)
def _sound() -> bool:
    """Whether cuDNN is there, and recent enough to trust."""
    return torch.backends.cudnn.is_available() and (torch.backends.cudnn.version() or 0) >= OLDEST


def available(device: torch.device) -> bool:
    """Whether the device has it, and the user has not turned it off (`torch.backends.cuda.enable_cudnn_sdp`).

    Its backward adds with atomics, so it is left alone under `torch.use_deterministic_algorithms`.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    index = device.index if device.index is not None else torch.cuda.current_device()
    if not (_hopper(index) and _sound()):
        return False
    return torch.backends.cuda.cudnn_sdp_enabled() and not torch.are_deterministic_algorithms_enabled()


@lru_cache(maxsize=1024)
def expresses(program: Program) -> bool:
    """Whether the program is ``scale * s`` with at most a causal mask."""
    f = form(program)
    return f is not None and f.mask is None and not program.captures


def _readable(t: Tensor) -> bool:
    """Rows of consecutive elements, 16 bytes apart or a multiple of it."""
    if t.stride(3) != 1 or t.data_ptr() % 16:
        return False
    return all(s > 0 and s % 8 == 0 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True) if n > 1)


def fits(b: int, h: int, n: int, m: int, d: int, dv: int, causal: bool) -> bool:
    """Whether it takes these sizes: batch, heads of q, lengths of queries and keys, head dims of q and v.

    A causal mask starts top left here.
    """
    if max(b, h) > LARGEST_BATCH or n == 1 or (m % TILE == TILE // 2 and not causal):
        return False
    return d % 8 == 0 and 0 < d <= LARGEST_HEAD_DIM and dv == d and m >= FEWEST_KEYS and not (causal and n != m)


def supports(q: Tensor, k: Tensor, v: Tensor, program: Program, dropout_p: float) -> bool:
    """Whether this call may go to cuDNN; `available` is asked apart."""
    if dropout_p or q.dtype not in HALVES or v.dtype != q.dtype or not expresses(program):
        return False
    f = form(program)
    assert f is not None
    b, h, n, d = q.shape
    if 0 in (*q.shape, *k.shape) or not fits(b, h, n, k.shape[2], d, v.shape[3], f.causal):
        return False
    return _readable(q) and _readable(k) and _readable(v)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, program: Program) -> tuple[Tensor, Tensor]:
    """(out (B, H, N, D) in q's memory order, base-2 lse (B, H, N) fp32) of a supported call."""
    f = form(program)
    assert f is not None
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, f.causal, False, scale=f.scale)
    return out, lse.squeeze(-1) * LOG2E


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, program: Program, out: Tensor, lse: Tensor
) -> Sequence[Tensor]:
    """(dq, dk, dv) of a supported call."""
    f = form(program)
    assert f is not None
    if do.stride() != out.stride():
        do = torch.empty_like(out).copy_(do)
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # seed and offset of a dropout that there is not
    n, m = q.shape[2], k.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, out, (lse * LN2).unsqueeze(-1), unused, unused, None, None, None, n, m, 0.0, f.causal, scale=f.scale
    )
