"""ATen's own CPU attention, forward, where it computes exactly what a program says.

It computes ``softmax(scale * s + mask) v``, causal or not. So the program has to read ``scale * s`` under additive masks and
``where`` masks, and the mask is collected into one additive tensor. Some of its ways differ from eager, and calls that could
see them go to the tiled reference instead: rows without a key, and rows whose scores are all -inf or NaN, give 0 (eager: NaN);
and a key whose score a mask replaces by -1e9 is visible beside scores of -1e10, which it is not where the mask is added, as ATen
adds it. So ATen is asked only where the operands bound the scores, and a mask leaves each row a key that is not hidden.

Its backward is not used. It takes the probabilities from exp(s - lse) and delta from sum(do out), whose roundings do not cancel
where a row is almost all one key's: gradients in fp32 are then up to 50 times as far from float64 as eager's (q = k = v, N = 37,
no scale), and in 16 bits those that add up over keys (of a key bias) 2 to 4 times. It also forgets how many keys share a row
whose mask is a large finite number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .evaluate import Box, Environment, evaluate
from .program import Program
from .sdpa import Form, form

__all__ = ["attention_forward", "supports"]

LOG2E = math.log2(math.e)
FLOOR = -1e3  # a row whose mask is nowhere above this may be hidden whole
LARGEST_SCORE = 1e8  # finite, and small beside a number that hides a key (`sdpa.HIDDEN`)
LARGEST_MASK = 2**22  # elements of a mask that is made for the call, rather than passed in

aten = torch.ops.aten


def _mask_size(f: Form, sizes: Sequence[int]) -> int:
    return math.prod(n for n, axis in zip(sizes, "bhqk", strict=True) if f.mask is not None and f.mask.depends_on(axis))


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    program: Program,
    dropout_p: float,
) -> bool:
    """Whether ATen may be asked; what a mask holds is looked at later, in the call."""
    f = form(program)
    if f is None or dropout_p or not q.dtype == k.dtype == v.dtype or q.shape[-1] != v.shape[-1]:
        return False
    if 0 in (*q.shape, *k.shape) or not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return False
    passed = sum(c.numel() for c in captures)
    return _mask_size(f, (*q.shape[:3], k.shape[2])) <= max(passed, LARGEST_MASK)


def _mask(
    f: Form, q: torch.Tensor, k: torch.Tensor, captures: Sequence[torch.Tensor], params: Sequence[int]
) -> tuple[torch.Tensor | None, bool]:
    """The additive mask, (1 or B, 1 or H, 1 or N, 1 or M), and whether under it each row has a key, and no score +inf or NaN."""
    if f.mask is None:
        return None, True  # causal or not, each row sees key 0
    (batch, heads, n, _), m = q.shape, k.shape[2]
    box = Box((0, batch), (0, heads), (0, n), (0, m))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    env = Environment(box, {"B": batch, "H": heads, "N": n, "M": m}, captures, params, dtype, q.device)
    (mask,) = evaluate([f.mask], env)
    mask = torch.as_tensor(mask, dtype=dtype, device=q.device)
    mask = mask[(None,) * (4 - mask.dim())]
    best = mask[..., 0] if f.causal else mask.amax(-1)  # under a causal mask the first row has key 0 alone
    return mask, bool((best > FLOOR).all() & (mask.amax() < LARGEST_SCORE))


def _finite(*results: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite: one pass each (a sum that overflows only costs time)."""
    return all(math.isfinite(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)).item()) for t in results)


def _bounded(q: torch.Tensor, k: torch.Tensor, scale: float) -> bool:
    """Whether no product of a query and a key can be NaN, infinite, or larger than `LARGEST_SCORE`: one pass over each."""
    ends = torch.stack([*torch.aminmax(q), *torch.aminmax(k)]).abs().double().tolist()
    return abs(scale) * q.shape[-1] * max(ends[:2]) * max(ends[2:]) <= LARGEST_SCORE and not any(map(math.isnan, ends))


def _grouped(t: torch.Tensor, heads: int) -> torch.Tensor:
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    params: Sequence[int],
    program: Program,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(out, base-2 lse) of a supported call; None where a row may see no key, or something is NaN, infinite or huge."""
    f = form(program)
    assert f is not None
    mask, safe = _mask(f, q, k, captures, params)
    if not safe or not _bounded(q, k, f.scale):
        return None
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, _grouped(k, q.shape[1]), _grouped(v, q.shape[1]), 0.0, f.causal, attn_mask=mask, scale=f.scale
    )
    return (out, lse.mul_(LOG2E)) if _finite(out) else None
