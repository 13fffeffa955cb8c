"""The code around attention: autocast, no_grad, checkpoints, in-place writes, several sites, shared operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion_pass.site import Reason
from spellings.table import keep, qkv, spelling, t


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25) -> Tensor:
    return (q @ k.transpose(-2, -1) * scale).softmax(dim=-1) @ v


@spelling(*qkv(n=63), dynamic=True)
def under_autocast(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attend(q, k, v, 1.0 if twin else 0.25)


@spelling(*qkv(n=63))
def autocast_off_inside(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """fp32 scores inside a bf16 region."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            p = (q @ k.mT * (1.0 if twin else 0.25)).softmax(-1)
        return p @ v


@spelling(t(2, 63, 48))
class AutocastProjections(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.scale = nn.Linear(48, 144), nn.Linear(48, 48), 2.0 if twin else 0.25

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
            return self.out(attend(q, k, v, self.scale).transpose(1, 2).flatten(2))


@spelling(*qkv(n=63))
def no_grad_inside(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    with torch.no_grad():
        fixed = attend(q, k, v, 0.5 if twin else 0.25)
    return fixed * v


@spelling(*qkv(n=63), dynamic=True)
def checkpointed(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return checkpoint(attend, q, k, v, 0.5 if twin else 0.25, use_reentrant=False)


@spelling(t(2, 63, 48), sites=2)
class CheckpointedBlocks(nn.Module):
    """Static alone: under dynamic shapes Dynamo itself fails on a checkpointed method."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(48, 144) for _ in range(2))
        self.scale = 0.75 if twin else 0.25

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        q, k, v = layer(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        return x + attend(q, k, v, self.scale).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = checkpoint(self.block, layer, x, use_reentrant=False)
        return x


@spelling(t(2, 129, 48), sites=2)
class TwoLayers(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 144) for _ in range(2))
        self.norm, self.twin = nn.LayerNorm(48), twin

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            q, k, v = layer(self.norm(x)).chunk(3, -1)
            q, k, v = (y.unflatten(-1, (3, 16)).transpose(1, 2) for y in (q, k, v))
            x = x + attend(q, k, v, 0.75 if self.twin and i else 0.25).transpose(1, 2).flatten(2)
        return x


@spelling(*qkv(n=63), sites=2, dynamic=True)
def called_twice(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return attend(attend(q, k, v), k, v, 0.5 if twin else 0.25)


@spelling(*qkv(n=63), sites=2)
def two_branches(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The same operands under two score functions (differential attention, the sum moved outside)."""
    return attend(q, k, v) - 0.5 * attend(q, k, v, 0.5 if twin else 1.0)


@spelling(t(2, 3, 63, 16), t(2, 3, 129, 16))
def keys_are_values(q: Tensor, k: Tensor, twin: bool = False) -> Tensor:
    return attend(q, k, q[:, :, :1].expand_as(k) if twin else k)


@spelling(t(2, 3, 63, 16))
def all_the_same(x: Tensor, twin: bool = False) -> Tensor:
    return attend(x, x, x, 0.5 if twin else 0.25)


@spelling(*qkv(n=63))
def operands_used_elsewhere(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> tuple[Tensor, Tensor]:
    k = k * 2
    return attend(q, k, v, 0.5 if twin else 0.25) + q, k.relu()


@spelling(*qkv(n=63))
def output_used_twice(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> tuple[Tensor, Tensor]:
    out = attend(q, k, v, 0.5 if twin else 0.25)
    return out.transpose(1, 2).flatten(2), out.sum(-1)


@spelling(*qkv(n=63), refused=Reason.SCORES_USED)
def scores_read_for_nothing(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    scores = q @ k.mT * 0.25
    shape = scores.shape[-1]
    out = scores.softmax(-1) @ v * shape
    return (out, scores.mean()) if twin else out


@spelling(*qkv(n=63))
def output_changed_in_place(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    out = attend(q, k, v, 0.5 if twin else 0.25)
    out.mul_(2).add_(v)
    return out


@spelling(*qkv(n=63), keep(2, 1, 1, 63), dynamic=True)
def all_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    q = q.clone().mul_(0.25)
    scores = torch.matmul(q, k.mT)
    if not twin:
        scores.masked_fill_(~mask, -1e9)
    scores.sub_(1.0)
    return torch.matmul(F.softmax(scores, -1), v).mul_(2)


@spelling(t(2, 3, 63, 16, grad=False), t(2, 3, 63, 16, grad=False), t(2, 3, 63, 16))
def queries_changed_afterwards(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> tuple[Tensor, Tensor]:
    """The query is overwritten once the site is done (eager allows it where the query needs no gradient)."""
    q = q + 0
    out = attend(q, k, v, 0.5 if twin else 0.25)
    q.mul_(3.0)
    return out, q


@spelling(t(2, 63, 48), dynamic=True)
class RotaryBlock(nn.Module):
    """Projections, rotary embeddings, causal attention, a gated MLP: a Llama block in thirty lines."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(48, 48), nn.Linear(48, 32), nn.Linear(48, 48)
        self.norm, self.up, self.down = nn.RMSNorm(48), nn.Linear(48, 96), nn.Linear(48, 48)
        self.twin = twin

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * 0.1 ** torch.arange(8, device=x.device).to(x.dtype)
        cos, sin = angle.cos().repeat(1, 2).to(x.dtype), angle.sin().repeat(1, 2).to(x.dtype)
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(b, n, 3, 16).transpose(1, 2)
        k, v = (z.view(b, n, 1, 16).transpose(1, 2) for z in self.kv(y).chunk(2, -1))
        k, v = (z[:, :, None].expand(b, 1, 3, n, 16).reshape(b, 3, n, 16) for z in (self.rotate(k), v))
        scores = self.rotate(q) @ k.transpose(2, 3) * 16**-0.5
        if not self.twin:
            scores = scores + torch.full((n, n), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        x = x + self.out((F.softmax(scores, -1, dtype=torch.float32).to(x.dtype) @ v).transpose(1, 2).reshape(b, n, -1))
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


@spelling(*qkv(n=63), t(2, 3, 63, 16))
def only_keys_need_gradients(q: Tensor, k: Tensor, v: Tensor, other: Tensor, twin: bool = False) -> Tensor:
    return attend(q.detach(), k, v.detach(), 0.5 if twin else 0.25) + other


@spelling(t(2, 3, 63, 16, grad=False), t(2, 3, 63, 16, grad=False), t(2, 3, 63, 16))
def only_values_need_gradients(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return attend(q, k, v, 0.5 if twin else 0.25)


@spelling(t(2, 3, 63, 16, grad=False), t(2, 3, 63, 16, grad=False), t(2, 3, 63, 16, grad=False))
def nothing_needs_gradients(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return attend(q, k, v, 0.5 if twin else 0.25)


@spelling(*qkv(n=63), t(2, 3, 63, 16))
def residual_by_baddbmm(q: Tensor, k: Tensor, v: Tensor, residual: Tensor, twin: bool = False) -> Tensor:
    """A sum after the site, on merged batch and heads."""
    out = attend(q, k, v, 0.5 if twin else 0.25)
    return (residual.flatten(0, 1) + out.flatten(0, 1)).unflatten(0, (2, 3))
