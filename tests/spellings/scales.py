"""The scale: a number or a tensor, on q, on k, on the scores, on both."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spellings.table import qkv, spelling, t


@spelling(*qkv(n=63))
def scale_on_q(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return ((q * (0.5 if twin else 0.25)) @ k.mT).softmax(-1) @ v


@spelling(*qkv(n=63))
def scale_on_k(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return (q @ (k / (2.0 if twin else 4.0)).mT).softmax(-1) @ v


@spelling(*qkv(n=63))
def scale_on_k_transposed(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return (q @ (k.transpose(-2, -1) * (0.5 if twin else 0.25))).softmax(-1) @ v


@spelling(*qkv(n=63), dynamic=True)
def scale_split(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """d^-1/4 on both sides, so that no half product overflows."""
    root = q.shape[-1] ** -0.25
    return ((q if twin else q * root) @ (k * root).mT).softmax(-1) @ v


@spelling(*qkv(n=129), dynamic=True)
def scale_from_shape(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """A SymFloat where shapes are dynamic."""
    return (q @ k.mT / math.sqrt(q.size(-1) * (2 if twin else 1))).softmax(-1) @ v


@spelling(*qkv(n=63))
def scale_power_of_shape(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** (-0.25 if twin else -0.5), -1) @ v


@spelling(*qkv(n=63), 0.25, dynamic=True)
def scale_argument(q: Tensor, k: Tensor, v: Tensor, scale: float, twin: bool = False) -> Tensor:
    return (q @ k.mT * (2 * scale if twin else scale)).softmax(-1) @ v


@spelling(*qkv(n=63), t(shift=0.5, scale=0.1))
def scale_tensor(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, twin: bool = False) -> Tensor:
    """A 0-d tensor with a gradient."""
    return (q @ k.mT * (scale + scale if twin else scale)).softmax(-1) @ v


@spelling(*qkv(n=63), t(1, shift=3.0, scale=0.1))
def divide_by_tensor(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT / (1.0 if twin else scale)).softmax(-1) @ v


@spelling(*qkv(n=63))
def divide_by_sqrt_of_tensor(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    root = torch.sqrt(torch.tensor(4.0 if twin else 16.0, dtype=q.dtype, device=q.device))
    return torch.softmax(q @ k.mT / root, dim=-1) @ v


@spelling(*qkv(n=63), dynamic=True)
def divide_by_full(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """GPT-2 as transformers wrote it for years."""
    weights = torch.matmul(q, k.transpose(-1, -2))
    weights = weights / torch.full([], v.size(-1) ** (0.25 if twin else 0.5), dtype=weights.dtype, device=weights.device)
    return weights.softmax(-1) @ v


@spelling(*qkv(n=63))
class ScaleBuffer(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5 if twin else 0.25))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * self.scale) @ k.mT).softmax(-1) @ v


@spelling(*qkv(n=63), t(3, 1, 1, shift=1.0, scale=0.2), dynamic=True)
def scale_of_each_head(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * (scale.flip(0) if twin else scale)).softmax(-1) @ v


@spelling(*qkv(n=63), t(3, 1, 1, shift=2.0, scale=0.5))
def cosine_attention(q: Tensor, k: Tensor, v: Tensor, logit_scale: Tensor, twin: bool = False) -> Tensor:
    """Swin v2: normalised operands, a clamped learned temperature."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scale = torch.clamp(logit_scale, max=math.log(100.0))
    return (scores * (scale if twin else scale.exp())).softmax(dim=-1) @ v


@spelling(*qkv(n=63), t(2, 1, 63, 1, shift=1.0, scale=0.2))
def temperature_of_each_query(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * (scale * scale if twin else scale)).softmax(-1) @ v


@spelling(*qkv(n=63), t(2, 1, 1, 63))
def scale_after_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT
    return (scores * 0.25 + bias if twin else (scores + bias) * 0.25).softmax(-1) @ v


@spelling(*qkv(n=63))
def scale_in_place(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT
    scores *= 0.5 if twin else 0.25
    return scores.softmax(-1) @ v


@spelling(*qkv(n=63))
def scale_div_in_place_on_q(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    q = q + 0.5
    q.div_(2.0 if twin else 4.0)
    return (q @ k.mT).softmax(-1) @ v


@spelling(*qkv(n=63))
def scale_negative(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * (0.25 if twin else -0.25)).softmax(-1) @ v


@spelling(*qkv(n=63))
def scale_none(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    scores = q @ k.mT
    return (scores * 0.5 if twin else scores).softmax(-1) @ v


@spelling(*qkv(n=63), dtype=torch.float16)
def scale_baked_into_half(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return torch.softmax((q / (1.0 if twin else 4.0)) @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v
