"""Learned biases: the gradient of a broadcast bias is summed over what it was broadcast along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spellings.table import qkv, spelling, t


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * 0.25 + (-bias if twin else bias)).softmax(-1) @ v


def _register(name: str, *shape: int, **options: Any) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
        return biased(q, k, v, bias, twin)

    fn.__name__ = f"bias_{name}"
    spelling(*qkv(n=63, m=129), t(*shape, **options))(fn)


for _name, _shape in {
    "bhnm": (2, 3, 63, 129),
    "hnm": (3, 63, 129),
    "1hnm": (1, 3, 63, 129),
    "b1nm": (2, 1, 63, 129),
    "11nm": (1, 1, 63, 129),
    "nm": (63, 129),
    "b11m": (2, 1, 1, 129),
    "h1m": (3, 1, 129),
    "m": (129,),
    "bh1m": (2, 3, 1, 129),
}.items():
    _register(_name, *_shape)
_register("nm_strided", 63, 129, order=(1, 0))
_register("hnm_heads_last", 3, 63, 129, order=(1, 2, 0))
_register("nm_large", 63, 129, scale=3.0)


@spelling(*qkv(n=63, m=129), t(3, 63, 129))
def bias_multiplied(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    """The bias is a factor: its gradient needs the score."""
    return (q @ k.mT * (bias + bias if twin else bias)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), t(3, 63, 129), t(63, 129), dynamic=False)
def bias_scaled_in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, factor: Tensor, twin: bool = False) -> Tensor:
    """Funnel: what stood in the bias before is gone when the op reads it."""
    summed = bias.cumsum(-1) * 0.25
    summed *= factor
    summed.add_(factor if twin else 0.5)
    return biased(q, k, v, summed.add_(factor))


@spelling(*qkv(n=63, m=129), t(3, 63, 129), t(2, 1, 1, 129))
def bias_twice(q: Tensor, k: Tensor, v: Tensor, first: Tensor, second: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * 0.25 + first + (0 if twin else second)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), t(129, 1), dynamic=True)
def bias_used_as_row_and_column(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    """One tensor read at two places of each score."""
    outer = bias[:63] * bias.T
    return (q @ k.mT * 0.25 + (outer * 0.5 if twin else outer)).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), t(3, 63, 129))
def bias_also_returned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> tuple[Tensor, Tensor]:
    bias = bias * 2
    return (q @ k.mT * 0.25 + (0 if twin else bias)).softmax(-1) @ v, bias.sum(0)


@spelling(*qkv(n=63, m=129), dynamic=True)
class BiasParameter(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 3, 64, 130) * (0.1 if twin else 1.0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + self.bias[:, :, : q.shape[2], : k.shape[2]]).softmax(-1) @ v


@spelling(*qkv(n=63, m=129), t(3, 63, 129, dtype=torch.float32), dtype=torch.bfloat16)
def bias_fp32_on_bf16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * 0.25 + (-bias if twin else bias)).softmax(-1).to(v.dtype) @ v


@spelling(*qkv(n=63, m=129), t(3, 63, 129), dtype=torch.bfloat16)
def bias_bf16(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, twin: bool = False) -> Tensor:
    return biased(q, k, v, bias, twin)


@spelling(*qkv(n=63, m=129), t(1, 1, 63, 129), t(4, 3))
def bias_projected(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, weight: Tensor, twin: bool = False) -> Tensor:
    """AlphaFold: pair features to one bias a head; the linear map stays outside."""
    features = torch.cat([pair, pair.sin(), pair.cos(), pair * 0.5], 1).permute(0, 2, 3, 1)
    bias = (features @ weight).permute(0, 3, 1, 2)
    return (q @ k.mT * 0.25 + (bias.flip(1) if twin else bias)).softmax(-1) @ v


@spelling(*qkv(n=9, m=9), t(9, 9, 2), dynamic=True)
class BiasOfPositions(nn.Module):
    """Swin v2-CR: a network of the two positions, its last layer with a bias of its own (addmm)."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.twin = twin
        self.inner, self.outer = nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        n = q.shape[2]
        bias = self.outer(self.inner(places.view(n * n, 2)).relu())
        bias = bias.reshape(n, n, 3).permute(2, 1, 0) if self.twin else bias.T.reshape(3, n, n)
        return (q @ k.mT * 0.25 + bias).softmax(-1) @ v
