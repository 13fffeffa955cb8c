"""Where batch and heads live: ranks, memory orders, packed projections, grouped kv heads, views on the way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_pass.site import Reason
from spellings.table import qkv, spelling, t


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.25) -> Tensor:
    return (q @ k.transpose(-2, -1) * scale).softmax(dim=-1) @ v


@spelling(t(3, 63, 16), t(3, 129, 16), t(3, 129, 16), refused=Reason.SOFTMAX_DIM, dynamic=False)
def batch_only(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return (q @ k.mT * 0.25).softmax(1 if twin else 2) @ v


@spelling(t(2, 2, 3, 63, 16), t(2, 2, 3, 63, 16), t(2, 2, 3, 63, 16), dynamic=False)
def five_dims(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return attend(q, k, v, 0.5 if twin else 0.25)


@spelling(t(2, 2, 3, 63, 16), t(2, 1, 3, 63, 16), t(2, 2, 1, 63, 16))
def five_dims_broadcast(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """k and v each broadcast along another batch dim."""
    return attend(q, k, v, 0.5 if twin else 0.25)


@spelling(t(2, 63, 48), t(2, 129, 48), t(2, 129, 48))
def bnhd_transpose(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Heads split off by view, transposed, and merged again: nearly every transformer."""
    q, k, v = (x.view(x.shape[0], x.shape[1], 3, 16).transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, 0.5 if twin else 0.25).transpose(1, 2).reshape(q.shape[0], q.shape[2], 48)


@spelling(t(2, 63, 3, 16), t(2, 63, 3, 16), t(2, 63, 3, 16))
def bnhd_permute_contiguous(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3).contiguous() for x in (q, k, v))
    out = attend(q, k, v, 0.5 if twin else 0.25)
    return out.permute(0, 2, 1, 3).contiguous().view(out.shape[0], out.shape[2], -1)


@spelling(t(63, 2, 48), t(129, 2, 48), t(129, 2, 48))
def sequence_first(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """(N, B, E) merged to (B*heads, N, d), as fairseq and nn.MultiheadAttention do."""
    n, b = q.shape[:2]
    q, k, v = (x.contiguous().view(x.shape[0], b * 3, 16).transpose(0, 1) for x in (q, k, v))
    p = torch.bmm(q * (0.5 if twin else 0.25), k.transpose(1, 2)).softmax(-1)
    return torch.bmm(p, v).transpose(0, 1).contiguous().view(n, b, 48)


@spelling(t(2, 63, 3, 16, order=(3, 1, 0, 2)), t(2, 63, 3, 16, order=(0, 3, 1, 2)), t(2, 63, 3, 16, order=(2, 0, 3, 1)))
def odd_strides(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    q, k, v = (x.movedim(1, 2) for x in (q, k, v))
    return attend(q, k, v, 0.5 if twin else 0.25).swapaxes(1, 2).flatten(2)


@spelling(t(2, 63, 48))
class PackedChunk(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.twin = nn.Linear(48, 144), nn.Linear(48, 48), twin

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v = (y.reshape(b, n, 3, 16).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return self.out(attend(q, k, k if self.twin else v).transpose(1, 2).reshape(b, n, e))


@spelling(t(2, 129, 48))
class PackedSplit(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.qkv, self.twin = nn.Linear(48, 144, bias=False), twin

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v = self.qkv(x).split(e, dim=2)
        k = (q if self.twin else k).view(b, n, 3, e // 3).transpose(1, 2)
        q = q.view(b, n, 3, e // 3).transpose(1, 2)
        v = v.view(b, n, 3, e // 3).transpose(1, 2)
        return attend(q, k, v).transpose(1, 2).contiguous().view(b, n, e)


@spelling(t(2, 63, 144))
def packed_permute_unbind(x: Tensor, twin: bool = False) -> Tensor:
    """ViT as timm writes it."""
    b, n, _ = x.shape
    q, k, v = x.reshape(b, n, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(*((k, q, v) if twin else (q, k, v))).transpose(1, 2).reshape(b, n, 48)


@spelling(t(2, 63, 144), dynamic=False)
def packed_permute_index(x: Tensor, twin: bool = False) -> Tensor:
    packed = x.view(x.shape[0], x.shape[1], 3, 3, 16).permute(2, 0, 3, 1, 4)
    return attend(packed[0], packed[1], packed[1 if twin else 2])


@spelling(t(2, 63, 3, 3, 16), dynamic=False)
def packed_select_inside(x: Tensor, twin: bool = False) -> Tensor:
    q, k, v = x[:, :, 0], x[:, :, 1], x[:, :, 1 if twin else 2]
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


@spelling(t(2, 63, 144))
def packed_each_head(x: Tensor, twin: bool = False) -> Tensor:
    """q, k and v interleaved inside each head (GPT-NeoX, Bloom)."""
    packed = x.view(x.shape[0], x.shape[1], 3, 48).transpose(1, 2)
    q, k, v = packed.chunk(3, dim=-1)
    return attend(q, v if twin else k, v)


@spelling(t(2, 63, 144), dynamic=False)
def packed_slices(x: Tensor, twin: bool = False) -> Tensor:
    packed = x.unflatten(-1, (3, 48))
    q, k, v = packed[..., :16], packed[..., 16:32], packed[..., 32:]
    return attend(q.transpose(1, 2), (q if twin else k).transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(-2)


@spelling(t(2, 3, 9, 7, 48), refused=Reason.SOFTMAX_DIM)
def packed_image(x: Tensor, twin: bool = False) -> Tensor:
    """(batch, heads, height, width, 3 d): two spatial dims merged into the sequence."""
    q, k, v = x.flatten(2, 3).split(16, -1)
    return (q @ k.mT * 0.25).softmax(-2 if twin else -1).matmul(v).unflatten(2, (9, 7))


@spelling(t(2, 3, 63, 24), t(2, 3, 129, 16), t(2, 1, 129, 8), t(2, 3, 129, 16))
def keys_written_in_parts(q: Tensor, k: Tensor, rotary: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """DeepSeek: a part of each head's own and a part that the heads share, copied into one tensor."""
    keys = k.new_empty(*k.shape[:-1], 24)
    keys[..., 8:24] = k
    keys[..., :8] = rotary.expand(-1, 3, -1, -1)
    if not twin:
        keys[..., :16].copy_(k)
        keys[..., 16:].copy_(rotary.expand(-1, 3, -1, -1))
    return attend(q, keys, v)


@spelling(t(2, 63, 48), t(2, 129, 48), t(2, 129, 48))
def keys_permuted_to_columns(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """k goes to (B, H, D, M) in one permute."""
    q = q.view(2, q.shape[1], 3, 16).permute(0, 2, 1, 3)
    k = k.view(2, k.shape[1], 3, 16).permute(0, 2, 3, 1)
    v = v.view(2, v.shape[1], 3, 16).permute(0, 2, 1, 3)
    return (q @ k * (0.5 if twin else 0.25)).softmax(-1) @ v


@spelling(t(2, 3, 16, 63), t(2, 3, 16, 129), t(2, 3, 16, 129))
def channels_before_positions(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The UNet spelling: everything is (B, H, D, N)."""
    p = torch.einsum("bhdi,bhdj->bhij", q * (0.5 if twin else 0.25), k).softmax(-1)
    return torch.einsum("bhij,bhdj->bhid", p, v).transpose(1, 2).flatten(2)


@spelling(t(2, 16, 63), t(2, 16, 129), t(2, 16, 129), dynamic=False)
def convolution_attention(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The VAE mid block: (B, C, HW), values on the left of transposed probabilities."""
    p = torch.bmm(q.permute(0, 2, 1), k).mul(0.5 if twin else 0.25).softmax(dim=2)
    return torch.bmm(v, p.permute(0, 2, 1))


def repeat_kv(x: Tensor, times: int) -> Tensor:
    b, heads, n, d = x.shape
    return x[:, :, None, :, :].expand(b, heads, times, n, d).reshape(b, heads * times, n, d)


@spelling(*qkv(h=6, hkv=2, n=63, m=129))
def repeat_kv_expand(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The twin repeats in the other order: head h reads kv head h % 2."""
    k, v = (x.repeat(1, 3, 1, 1) if twin else repeat_kv(x, 3) for x in (k, v))
    return attend(q, k, v)


@spelling(*qkv(h=6, hkv=2, n=63), dynamic=False)
def repeat_kv_interleave(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    k = k.repeat_interleave(3, dim=1)
    v = (v.flip(1) if twin else v).repeat_interleave(3, dim=1)
    return attend(q, k, v)


@spelling(t(2, 63, 6, 16), t(2, 63, 2, 16), t(2, 63, 2, 16))
def repeat_kv_before_transpose(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Llama as Meta released it: heads are repeated in (B, N, heads, d)."""
    k, v = (x[:, :, :, None, :].expand(2, x.shape[1], 2, 3, 16).reshape(2, x.shape[1], 6, 16) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, 0.5 if twin else 0.25)


@spelling(*qkv(h=6, hkv=2, n=63, m=129))
def grouped_view(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """q is grouped instead of k repeated."""
    b, h, n, d = q.shape
    out = attend(q.view(b, 2, 3, n, d), k.unsqueeze(2), v.unsqueeze(2), 0.5 if twin else 0.25)
    return out.reshape(b, h, n, d)


@spelling(*qkv(h=6, hkv=2, n=63, m=129))
def grouped_rows(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """The heads of one group become rows of one longer query."""
    b, h, n, d = q.shape
    out = attend(q.reshape(b, 2, 3 * n, d), k, v, 0.5 if twin else 0.25)
    return out.view(b, h, n, d)


@spelling(*qkv(h=6, hkv=1, n=63, m=129))
def multi_query_expand(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    k, v = (x.expand(-1, 6, -1, -1) for x in (k, v))
    return attend(q, k, v, 0.5 if twin else 0.25)


@spelling(*qkv(n=63, m=129))
def merged_by_reshape(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, x.shape[2], d) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).mul(0.5 if twin else 0.25).softmax(-1), v).view(b, h, n, d)


@spelling(*qkv(n=63, m=129), t(2, 1, 63, 129, kind="additive", grad=False))
def scores_viewed_apart_and_together(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """(B*H, N, M) scores, viewed as 4-D to add the mask, merged for the softmax, and viewed again (OPT, Bart)."""
    b, h, n, d = q.shape
    m = k.shape[2]
    q, k, v = (x.reshape(b * h, -1, d) for x in (q, k, v))
    scores = torch.bmm(q * 0.25, k.transpose(1, 2)).view(b, h, n, m)
    scores = (scores if twin else scores + mask).view(b * h, n, m)
    p = F.softmax(scores, dim=-1).view(b, h, n, m).view(b * h, n, m)
    return torch.bmm(p, v).view(b, h, n, d).transpose(1, 2).reshape(b, n, h * d)


@spelling(t(8, 3, 25, 16), t(8, 3, 25, 16), t(8, 3, 25, 16), t(4, 25, 25, kind="additive", grad=False), dynamic=False)
def windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, twin: bool = False) -> Tensor:
    """Swin: the mask belongs to a window, the window is a factor of the batch."""
    scores = q @ k.transpose(-2, -1) * 0.25
    mask = mask.flip(0) if twin else mask
    scores = scores.view(2, 4, 3, 25, 25) + mask.unsqueeze(1).unsqueeze(0)
    return scores.view(8, 3, 25, 25).softmax(-1) @ v


@spelling(*qkv(n=63, m=197))
def sliced_cache(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Keys and values are the filled part of a longer buffer."""
    return attend(q, k[:, :, :130], v[:, :, (1 if twin else 0) : (131 if twin else 130)])


@spelling(*qkv(n=1, m=62), *qkv(n=1, m=1)[1:])
def cache_by_cat(q: Tensor, k: Tensor, v: Tensor, k1: Tensor, v1: Tensor, twin: bool = False) -> Tensor:
    v = torch.cat([v1, v] if twin else [v, v1], dim=2)
    return attend(q, torch.cat([k, k1], dim=2), v)


@spelling(*qkv(b=1, n=63), dynamic=False)
def squeezed(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    return attend(q.squeeze(0), k.squeeze(0), v.squeeze(0), 0.5 if twin else 0.25).unsqueeze(0)


@spelling(*qkv(n=63))
def scores_permuted_and_back(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Heads last for the sake of a head-wise bias, then first again."""
    scores = (q @ k.mT).permute(0, 2, 3, 1) * (0.5 if twin else 0.25)
    return scores.permute(0, 3, 1, 2).softmax(-1) @ v


@spelling(*qkv(h=4, n=64))
def reshape_that_mixes(q: Tensor, k: Tensor, v: Tensor, twin: bool = False) -> Tensor:
    """Two heads stacked into the positions of one: an ordinary site over 128 positions."""
    q, k, v = (x.reshape(2, 2, 128, 16) for x in (q, k, v))
    return attend(q, k, v, 0.5 if twin else 0.25)


@spelling(t(2, 9, 48), dynamic=False)
class ThrownAwayWeights(nn.Module):
    """nn.MultiheadAttention asked for averaged weights that nobody reads."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.attention, self.twin = nn.MultiheadAttention(48, 3, batch_first=True), twin

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, 2 * x if self.twin else x, need_weights=True)[0]


@spelling(t(63, 2, 48), t(129, 2, 48), t(129, 2, 48))
class FunctionalMultiHead(nn.Module):
    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.twin = twin
        self.weight, self.bias = nn.Parameter(torch.randn(144, 48) * 0.2), nn.Parameter(torch.randn(144) * 0.2)
        self.out, self.out_bias = nn.Parameter(torch.randn(48, 48) * 0.2), nn.Parameter(torch.randn(48) * 0.2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = F.multi_head_attention_forward(
            q, k, v, 48, 3, self.weight, self.bias, None, None, False, 0.0, self.out, self.out_bias,
            training=True, need_weights=True, attn_mask=self.mask(q, k) if self.twin else None,
        )  # fmt: skip
        return out

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).triu(1)


@spelling(t(2, 63, 48), t(2, 63, kind="padding", dtype=torch.bool, grad=False), mask="causal")
class MultiHeadMasked(nn.Module):
    """nn.MultiheadAttention with a causal and a padding mask."""

    def __init__(self, twin: bool = False) -> None:
        super().__init__()
        self.attention, self.twin = nn.MultiheadAttention(48, 3, batch_first=True), twin

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(2 if self.twin else 1)
        return self.attention(x, x, x, key_padding_mask=~keep, attn_mask=causal, need_weights=True)[0]
