"""``fusion_kernels.attention``: the op for people, who should not have to write score programs for what everyone uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .argument_types import check_types
from .checking import check_dense, check_dropout, check_operands, check_program
from .op import ATTENTION
from .program import SCORE, Capture, Node, Program, apply, const, index, load, parse

__all__ = ["attention"]

AXES = ("b", "h", "q", "k")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    program: Program | str | None = None,
    captures: Sequence[Tensor] = (),
    params: Sequence[int] = (),
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(f(q k^T)) v`` in one op, forward and backward, without an N x N tensor.

    The score is built in this order: times `scale`, `softcap`, plus `bias`, then everything masked is -inf. A row that
    sees no key is NaN, as in eager PyTorch. Differentiable in q, k, v and every floating-point scale, bias, mask, sink and
    capture, once and in backward mode: not by torch.func, and not under vmap.
    A tile of keys that `causal`, `window` or a mask over keys alone (padding) hides is skipped: a NaN or infinity in it does not
    reach the output, where in eager PyTorch 0 * NaN does.

    Args:
        q: (B, H, N, D), fp16, bf16 or fp32 (fp64 on a CPU too), any strides; D and Dv at most 256.
        k: (B, Hkv, M, D), q's dtype; H is a multiple of Hkv, and H // Hkv consecutive query heads share a key head.
        v: (B, Hkv, M, Dv).
        scale: default ``D ** -0.5``. A floating-point tensor of one element is read by the kernels, and has a gradient.
        causal: query i sees keys j <= i, counted from the first (top left), like ``F.scaled_dot_product_attention``.
        window: query i sees keys with |i - j| < window (with `causal`: the last `window` keys).
        bias: floating point, broadcastable to (B, H, N, M); added to the scores.
        mask: bool, broadcastable to (B, H, N, M), True where the query may see the key; or floating point, added.
        softcap: c: the scaled score s becomes c tanh(s / c).
        sink: floating point, broadcastable to (B, H, N): a score that takes its part of each row's softmax and has no value, as a
            column that is dropped after it. (H, 1) is one a head; zeros are softmax-one. A row that sees no key is the sink's: 0.
        dropout_p: probability to drop an attention weight.
        seed: int or 0-d int64 tensor on q's device that decides what is dropped; default: drawn from torch's generator.
        program: a score program instead of all of the above (no implicit scale), reading `captures` and `params`. Each capture
            has to hold every element that it reads, for all b, h, q and k; what tensors hold is not checked as an index.
        return_lse: also return log-sum-exp of the scores, (B, H, N), fp32, base 2, not differentiable.

    Returns:
        (B, H, N, Dv) in v's dtype and q's memory order; with `return_lse` a pair.

    Raises:
        ValueError: an argument does not fit; the message names it, its shape or value, and what was needed.
        TypeError: an argument is of another type than its annotation.
        NotImplementedError: called under vmap, or differentiated in forward mode or by torch.func.
    """
    if not torch.compiler.is_compiling():
        check_types(
            q, k, v, scale, causal, window, bias, mask, softcap, sink, dropout_p, seed, program, captures, params
        )  # fmt: skip
        check_operands(q, k, v)
        dropout_p = float(dropout_p)
    if program is not None:
        simple = {"scale": scale, "window": window, "bias": bias, "mask": mask, "softcap": softcap, "sink": sink}
        simple["causal"] = causal or None
        given = [name for name, value in simple.items() if value is not None]
        if given:
            raise ValueError(f"fusion_kernels: program was passed with {', '.join(given)}; needed: one or the other")
        text = program if isinstance(program, str) else program.text
    else:
        if captures or params:
            raise ValueError("fusion_kernels: captures or params were passed without a program; needed: the one that reads them")
        text, captures = _build(q, k, scale, causal, window, bias, mask, softcap, sink)
    if dropout_p and not isinstance(seed, Tensor):
        seed = torch.randint(2**62, (), device=q.device) if seed is None else torch.tensor(seed, device=q.device)
    seed = seed if dropout_p and isinstance(seed, Tensor) else None
    if not torch.compiler.is_compiling():
        check_program(q, k, captures, params, parse(text))
        check_dropout(q, dropout_p, seed)
    out, lse = ATTENTION(q, k, v, list(captures), list(params), text, dropout_p, seed)
    return (out, lse) if return_lse else out


def _build(
    q: Tensor,
    k: Tensor,
    scale: float | Tensor | None,
    causal: bool,
    window: int | None,
    bias: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    sink: Tensor | None,
) -> tuple[str, list[Tensor]]:
    """The program of the simple arguments, and the tensors that it reads."""
    if q.dim() != 4 or k.dim() != 4:
        bad, t = ("q", q) if q.dim() != 4 else ("k", k)
        raise ValueError(f"fusion_kernels: {bad} has shape {tuple(t.shape)}; needed: 4 dims (batch, heads, length, head dim)")
    if window is not None and window < 1:
        raise ValueError(f"fusion_kernels: window is {window}; needed: at least 1, the query's own position")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"fusion_kernels: softcap is {softcap}; needed: a positive number (None for no cap)")
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    tensors: list[Tensor] = []
    plans: list[tuple[str, str, tuple[bool, ...]]] = []
    learned = _scale(scale, q) if isinstance(scale, Tensor) else None
    for name, t in (("scale", learned), ("bias", bias), ("mask", mask), ("sink", sink)):
        if t is None:
            continue
        check_dense(name, t)
        if t.device != q.device:
            raise ValueError(
                f"fusion_kernels: {name} is on {t.device} and q on {q.device}; needed: one device, {name}.to(q.device)"
            )
        if name != "mask" and not t.dtype.is_floating_point:
            hint = "" if name == "scale" else " (a bool tensor is a mask)"
            raise ValueError(f"fusion_kernels: {name} has dtype {t.dtype}; needed: floating point{hint}")
        if not (t.dtype.is_floating_point or t.dtype == torch.bool):
            raise ValueError(f"fusion_kernels: mask has dtype {t.dtype}; needed: bool (True: visible) or floating point (added)")
        whole, dims = (full[:3], "(B, H, N)") if name == "sink" else (full, "(B, H, N, M)")
        if t.dim() > len(whole) or any(a not in (1, b) for a, b in zip(t.shape[::-1], whole[::-1])):
            raise ValueError(f"fusion_kernels: {name} has shape {tuple(t.shape)}; needed: broadcastable to {whole} {dims}")
        spread = tuple(bool(a == 1) for a in t.shape)
        plans.append((name, "bool" if t.dtype == torch.bool else "float", spread))
        tensors.append(t)
    factor = None if isinstance(scale, Tensor) else q.shape[3] ** -0.5 if scale is None else float(scale)
    return _text(factor, bool(causal), None if window is None else int(window), softcap, tuple(plans)), tensors


def _scale(scale: Tensor, q: Tensor) -> Tensor:
    """A scale that a program can read: 0-d, and on q's device, as torch itself takes a 0-d CPU tensor anywhere."""
    if scale.numel() != 1:
        raise ValueError(f"fusion_kernels: scale has shape {tuple(scale.shape)}; needed: one element (a bias may vary)")
    return scale.reshape(()).to(q.device) if scale.device.type == "cpu" else scale.reshape(())


@torch.compiler.assume_constant_result
def _text(
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    plans: tuple[tuple[str, str, tuple[bool, ...]], ...],
) -> str:
    """The program. scale: None: the first tensor. plans: for each tensor its argument, its kind, which dims are broadcast."""
    q, k = index("q"), index("k")
    x = apply("mul", SCORE, load(0, "float", []) if scale is None else const(scale))
    if softcap is not None:
        x = apply("mul", apply("tanh", apply("div", x, const(float(softcap)))), const(float(softcap)))
    visible: list[Node] = []
    sink = None
    if causal:
        visible.append(apply("le", k, q))
    if window is not None:
        visible.append(apply("gt", k, apply("sub", q, const(window))))
        if not causal:
            visible.append(apply("lt", k, apply("add", q, const(window))))
    for i, (name, kind, spread) in enumerate(plans):
        if name == "scale":
            continue
        axes = AXES[:3] if name == "sink" else AXES
        read = load(i, kind, [const(0) if one else index(n) for n, one in zip(axes[len(axes) - len(spread) :], spread)])
        if name == "sink":
            sink = read
        elif kind == "bool":
            visible.append(read)
        else:
            x = apply("add", x, read)
    if visible:
        p = visible[0]
        for other in visible[1:]:
            p = apply("and", p, other)
        x = apply("where", p, x, const(-math.inf))
    captures = tuple(Capture(kind, len(spread)) for _, kind, spread in plans)
    return Program(x, captures, zero_rows=sink is not None, sink=sink).text
