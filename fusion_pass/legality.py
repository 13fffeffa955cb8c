"""May a described site be fused, and should it be.

`check` refuses what the op cannot run (dtype, device, head dim) or must not (mutated storages); `profitable` is the cost
rule.  Both speak of the described site only; whether the scores and probabilities are needed elsewhere is seen in the graph
after the splice (`rewrite`).
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
import torch
from fusion_kernels import choice
from fusion_kernels.checking import MAX_HEAD_DIM

from .indexing import expr_of
from .match import Match
from .scores import Scores
from .site import Reason, Refused, overwritten
from .tape import Shadow, Value

__all__ = ["check", "profitable"]

DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def check(shadow: Shadow, match: Match, scores: Scores, *, device: torch.device) -> None:
    """Refuse what cannot or must not be fused.

    Raises:
        Refused: DEVICE, DTYPE, HEAD_DIM or MUTATION.
    """
    allowed = DTYPES.get(device.type)
    if allowed is None:
        raise Refused(Reason.DEVICE, f"tensors on {device.type}", "cuda or cpu")
    if trouble := choice.trouble(device):
        raise Refused(Reason.DEVICE, *trouble)
    q, k, v = match.q, match.k, match.v
    for name, factor in (("queries", q), ("keys", k), ("values", v)):
        if factor.dtype not in allowed:
            raise Refused(Reason.DTYPE, f"{name} of {factor.dtype} on {device.type}", ", ".join(map(str, allowed)))
    if q.dtype != k.dtype:
        raise Refused(Reason.DTYPE, f"queries of {q.dtype} and keys of {k.dtype}", "one dtype")
    for name, size in (("queries and keys", q.shape[3]), ("values", v.shape[3])):
        if not _at_most(size, MAX_HEAD_DIM, shadow):
            raise Refused(Reason.HEAD_DIM, f"head dim {size} of the {name}", f"a head dim of at most {MAX_HEAD_DIM}")
    tensors = [c for c in scores.captures if isinstance(c, Value)]
    for capture in tensors:
        if capture.tensor.device != device and capture.tensor.ndim:
            raise Refused(Reason.DEVICE, f"a mask or bias on {capture.tensor.device}, queries on {device}", "one device")
    _check_writes(shadow, match, scores)


def _at_most(size: sympy.Expr, limit: int, shadow: Shadow) -> bool:
    """For a symbolic size the answer for the size at hand, with a guard."""
    if size.is_Integer:
        return int(size) <= limit
    shape_env = shadow.values[0].tensor.fake_mode.shape_env  # pyright: ignore[reportAttributeAccessIssue]
    return bool(shape_env.evaluate_expr(sympy.Le(shadow.plain(size), limit)))


def _check_writes(shadow: Shadow, match: Match, scores: Scores) -> None:
    """The op reads its inputs where the output stood: nothing may write them between their use and that.

    What was written before their use, by index or through a view, is in them: keys put together in a tensor of their own.
    """
    end = match.end
    read: Iterable[Value] = [match.q.value, match.k.value, match.v.value, *(c for c in scores.captures if isinstance(c, Value))]
    for value in read:
        if shadow.written_between(value, value.seq, end):
            raise overwritten(value.shape)


def profitable(match: Match, kernel: str, device: torch.device, trained: bool = False, learned: bool = False) -> str | None:
    """Why fusing would not pay, or None where it does.

    Args:
        trained: whether it will have a backward. learned: and gradients of what the score reads beside queries and keys.

    On CPU ATen's own kernel is taken at any size, the tiled reference only where the scores are far larger than a cache: an
    estimate. Its backward is the tiled one: a step took 1.3 to 1.5 of eager's time at 2 million scores, 0.9 and (causal) 0.3
    at 16 million (D = 64, one thread). On a GPU a small site is bound by the host, which launches the kernels of torch.compile
    as fast as ours. Training steps of five masks under both on one H200: at 0.1 million scores ours took 0.7 to 1.7 of
    torch.compile's time, at 1.0 million 0.9 to 1.4, at 4.2 million (three masks) 0.7 to 0.9.  A window of 49 keys fills little of
    a tile, and the gradient of its bias is most of the work: a step of Swin-B took 1.13 of torch.compile's time.
    """
    n, m = match.q.shape[2], match.k.shape[2]
    elements = sympy.Mul(n, m, match.q.shape[0], match.q.shape[1])
    if device.type == "cpu":
        if kernel == "aten-cpu" and trained and elements.is_Integer and int(elements) < _CPU_TRAINED_MIN:
            return f"{int(elements)} scores are too few for a fused backward to pay on a CPU"
        if kernel == "aten-cpu":
            return None
        if elements.is_Integer and int(elements) < _CPU_TILED_MIN:
            return f"{int(elements)} scores fit the cache of a CPU, and no ATen kernel expresses the site"
        return None
    if elements.is_Integer and int(elements) < _CUDA_MIN:
        return f"{int(elements)} scores are too few for a fused kernel to pay"
    if trained and learned and m.is_Integer and int(m) < _CUDA_FEW_KEYS:
        return f"{int(m)} keys are too few for the gradient of a learned bias to pay"
    return None


_CPU_TILED_MIN = 1 << 26
_CPU_TRAINED_MIN = 1 << 24
_CUDA_MIN = 1 << 21
_CUDA_FEW_KEYS = 64


def site_device(match: Match) -> torch.device:
    return match.q.value.tensor.device


def bytes_saved(match: Match, scores: Scores, counted: set[Value]) -> int | None:
    """Scores and probabilities that eager would keep for the backward, in bytes; None for symbolic sizes.

    counted: those of sites that share them; they are left out, and what is counted here is put in.
    """
    b, h, n, _ = match.q.shape
    size = sympy.Mul(b, h, n, match.k.shape[2])
    if not size.is_Integer:
        return None
    full = {v for v in match.walked if sympy.Mul(*map(expr_of, v.shape)) == size and v.record is not None and not _is_view(v)}
    full -= counted.union(c for c in scores.captures if isinstance(c, Value))
    counted |= full
    return sum(int(size) * v.dtype.itemsize for v in full)


def _is_view(value: Value) -> bool:
    from .views import COPIES, VIEWS

    return value.record is not None and value.record.op in VIEWS and value.record.op not in COPIES
