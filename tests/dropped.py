"""Attention with dropout, held to eager under the same mask.

A mask can be read: where v is a part of the identity, the output is that part of the dropped probabilities, and what is kept is
not 0. The same seed gives the mask again for other values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from checks import assert_rule, exactly, run
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["Attention", "Dropping", "P", "assert_dropout", "assert_rate", "kept", "under"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
P = 0.125


class Dropping(nn.Module):
    """Attention in plain torch with dropout of its probabilities. q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv)."""

    def __init__(self, p: float = P, causal: bool = False) -> None:
        super().__init__()
        self.dropout, self.causal = nn.Dropout(p), causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).flatten(1, 2) for t in (k, v))
        x = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if self.causal:
            x = x.masked_fill(~torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril(), -math.inf)
        return self.dropout(x.softmax(-1)) @ v


def kept(call: Attention, q: Tensor, k: Tensor, v: Tensor, seed: int) -> Tensor:
    """Which probabilities `call` keeps under a seed: bool (B, H, N, M); False at hidden keys.

    Args:
        call: softmax(q k^T) v with dropout; it gets tensors of the shapes, dtype and need of gradients of `q`, `k` and `v`.
    """
    m, dv = v.shape[-2:]
    parts = []
    for start in range(0, m, dv):
        shown = torch.eye(m, device=v.device, dtype=v.dtype)[:, start : start + dv]
        shown = pad(shown, (0, dv - shown.shape[1])).expand(v.shape).contiguous()  # (B, Hkv, M, Dv)
        torch.manual_seed(seed)
        parts.append(call(q, k, shown.requires_grad_(v.requires_grad)).detach() != 0)
    return torch.cat(parts, -1)[..., :m]


def under(keep: Tensor, p: float, causal: bool) -> Attention:
    """Eager attention whose dropout keeps what `keep` says; k and v may have fewer heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        x = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            x = x.masked_fill(torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1), -math.inf)
        return (x.softmax(-1) * keep.to(x.dtype) / (1 - p)) @ v

    return attend


def assert_rate(keep: Tensor, p: float, causal: bool) -> None:
    """Of the keys that are seen, a part 1 - p is kept: over all, and by row, key and head, within 5.5 deviations."""
    seen = torch.ones_like(keep).tril() if causal else torch.ones_like(keep)
    assert not bool((keep & ~seen).any()), "a hidden key"
    for dims in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (2, 3)):
        number = seen.sum(dims).double()
        means = keep.sum(dims) / number
        far = ((means - (1 - p)).abs() / (p * (1 - p) / number).sqrt()).masked_fill(number < 100, 0.0)
        assert float(far.max()) < 5.5, f"kept: {means.flatten()[far.argmax()]:.5f}, wanted {1 - p} ({far.max():.1f} deviations)"


def assert_dropout(
    call: Attention,
    inputs: Sequence[Tensor],
    p: float,
    causal: bool,
) -> None:
    """Mask, output and every gradient of a compiled attention with dropout: the rate, the seed, and the rule of `checks`."""
    q, k, v = inputs
    first, again, other = (kept(call, q, k, v, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert_rate(first, p, causal)

    def seeded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return call(q, k, v)

    eager = under(first, p, causal)
    assert_rule(run(seeded, inputs), run(eager, inputs), exactly(eager, inputs))
