"""The custom ops: schema, fake, autograd and registration. What they do is in `calls`.

    attention(q, k, v, captures, params, program, dropout_p, seed) -> (out, lse)
    attention_backward(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs) -> (dq, dk, dv, dcaptures)

q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), any strides; out (B, H, N, Dv) in v's dtype and q's memory order; lse
(B, H, N) fp32 in base 2; dcaptures: the gradients of the captures that `needs` flags. The score program travels as text: it is
in every compile cache's key. So is the ops' name, which ends in a hash of this package's sources: a cache never serves what an
older formula compiled to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import calls, reference
from .blanks import nested_as

__all__ = ["ATTENTION", "ATTENTION_BACKWARD", "VERSION"]


def _version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


VERSION = _version()

# ---------------------------------------------------------------- fakes


def _empty(shape: Sequence[Any], like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(shape), nested_as(shape, like), dtype=dtype, device=like.device)


def _attention_fake(q, k, v, captures, params, program, dropout_p, seed):
    lse = q.new_empty(q.shape[:3], dtype=reference.compute_dtype(q.dtype))
    return _empty((*q.shape[:3], v.shape[3]), q, v.dtype), lse


def _attention_backward_fake(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs):
    dcaptures = [c.new_empty(c.shape) for c, need in zip(captures, needs, strict=True) if need]
    return *(_empty(x.shape, x, x.dtype) for x in (q, k, v)), dcaptures


# ---------------------------------------------------------------- autograd

# `torch.library.register_autograd` wraps every call, with gradients or without, in Python that takes longer than the launch of a
# kernel. Here a call goes to the implementation at once, unless something between autograd and the device wants to see it: a
# fake tensor mode, functionalization, a counter of flops.

_BELOW = torch._C._after_autograd_keyset
_BELOW_BITS = _BELOW.raw_repr()
_DEVICES = frozenset(torch._C.DispatchKeySet(key).raw_repr() for key in (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA))


def _plain(keys: torch._C.DispatchKeySet) -> bool:
    """Whether nothing but the device is left once autograd has seen a call."""
    return keys.raw_repr() & _BELOW_BITS in _DEVICES


def _redispatch(op: torch._ops.OpOverload, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & _BELOW, *arguments)


_INSTEAD = "Run this model without the fusion (or call fusion_kernels.reference.dense)."
_FORWARD_MODE = f"fusion_kernels: attention was differentiated in forward mode; the fused op has a backward alone. {_INSTEAD}"
_TORCH_FUNC = (
    "fusion_kernels: attention was differentiated by torch.func (grad, vjp, jacrev, hessian); the fused op knows torch.autograd "
    f"alone: call backward() or torch.autograd.grad. {_INSTEAD}"
)
_VMAP = (
    "fusion_kernels: attention was called under vmap with a mapped argument; the fused op has no rule for it: make the mapped "
    f"dim a part of the batch. {_INSTEAD}"
)


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, params: Any, program: str, dropout_p: float, seed: Any, *tensors: Any) -> tuple:
        q, k, v, *captures = tensors
        arguments = q, k, v, captures, params, program, dropout_p, seed
        out, lse = calls.attention(*arguments) if _plain(keys) else _redispatch(ATTENTION, keys, *arguments)
        ctx.save_for_backward(q, k, v, seed, out, lse, *captures)
        ctx.params, ctx.program, ctx.dropout_p = params, program, dropout_p
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple:
        q, k, v, seed, out, lse, *captures = ctx.saved_tensors
        if do is None:
            return (None,) * (8 + len(captures))
        needs = [need and c.is_floating_point() for need, c in zip(ctx.needs_input_grad[8:], captures, strict=True)]
        dq, dk, dv, dcaptures = ATTENTION_BACKWARD(
            do, q, k, v, captures, ctx.params, ctx.program, ctx.dropout_p, seed, out, lse, needs
        )
        left = iter(dcaptures)
        return None, None, None, None, None, dq, dk, dv, *(next(left) if need else None for need in needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple:
        raise NotImplementedError(_FORWARD_MODE)


class FusedAttentionGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, params: Any, program: str, dropout_p: float, needs: Any, *tensors: Any) -> tuple:
        do, q, k, v, seed, out, lse, *captures = tensors
        arguments = do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs
        results = calls.attention_backward(*arguments) if _plain(keys) else _redispatch(ATTENTION_BACKWARD, keys, *arguments)
        dq, dk, dv, dcaptures = results
        return dq, dk, dv, *dcaptures

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        raise RuntimeError(
            "fusion_kernels: attention was differentiated twice; the fused backward has no gradient of its own. "
            "Run this model without the fusion (or call fusion_kernels.reference.dense, which torch can differentiate again)."
        )

    jvp = backward


def _differentiated(*tensors: Tensor) -> bool:
    """Backward, or (in any grad mode) forward: torch looks for tangents itself then.

    Raises:
        NotImplementedError: a transform of torch.func asks: torch would say that our autograd.Function is not made for it.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors) or forward_ad._current_level >= 0):
        return False
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(_FORWARD_MODE if forward_ad._current_level >= 0 else _TORCH_FUNC)
    return True


def _mapped(info: Any, in_dims: Any, *arguments: Any) -> Any:
    """The rule of both ops under vmap."""
    raise NotImplementedError(_VMAP)


def _attention(keys, q, k, v, captures, params, program, dropout_p, seed):
    if _differentiated(q, k, v, *captures):
        return FusedAttention.apply(keys, params, program, dropout_p, seed, q, k, v, *captures)
    if _plain(keys):
        return calls.attention(q, k, v, captures, params, program, dropout_p, seed)
    return _redispatch(ATTENTION, keys, q, k, v, captures, params, program, dropout_p, seed)


def _attention_backward(keys, do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs):
    if _differentiated(do, q, k, v, out, lse, *captures):
        tensors = do, q, k, v, seed, out, lse, *captures
        dq, dk, dv, *dcaptures = FusedAttentionGradient.apply(keys, params, program, dropout_p, needs, *tensors)
        return dq, dk, dv, dcaptures
    if _plain(keys):
        return calls.attention_backward(do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs)
    return _redispatch(ATTENTION_BACKWARD, keys, do, q, k, v, captures, params, program, dropout_p, seed, out, lse, needs)


# ---------------------------------------------------------------- registration

# Straight to the dispatcher: `torch.library.custom_op` looks at every call for outputs that alias inputs, which took longer
# than the launch of a kernel (100 us a call under torch 2.11).
_LIBRARY = torch.library.Library("fusion_kernels", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] params, str program, float dropout_p, Tensor? seed"


def _register(name: str, schema: str, implementation: Any, fake: Any, autograd: Any) -> torch._ops.OpOverload:
    _LIBRARY.define(f"{name}{schema}", tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"fusion_kernels::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"fusion_kernels::{name}", _mapped, lib=_LIBRARY)
    return getattr(torch.ops.fusion_kernels, name).default


ATTENTION: torch._ops.OpOverload = _register(
    f"attention_{VERSION}", f"({_INPUTS}) -> (Tensor, Tensor)", calls.attention, _attention_fake, _attention
)
ATTENTION_BACKWARD: torch._ops.OpOverload = _register(
    f"attention_backward_{VERSION}",
    f"(Tensor do, {_INPUTS}, Tensor out, Tensor lse, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor[])",
    calls.attention_backward,
    _attention_backward_fake,
    _attention_backward,
)
