"""A score of +inf: the output is NaN however a softmax is written, dv at every key or at that one alone. As in eager."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import inf, nan

import pytest
import torch
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run
from fusion_kernels.choice import force
from torch import Tensor

import fusion_pass

N, M = 63, 129


def softmax(s: Tensor) -> Tensor:
    return s.softmax(-1)


def log_softmax(s: Tensor) -> Tensor:
    return s.log_softmax(-1).exp()


def shifted(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def logsumexp_of_shifted(s: Tensor) -> Tensor:
    s = s - s.amax(-1, keepdim=True).detach()
    return torch.exp(s - s.logsumexp(-1, keepdim=True))


def softmax_with_sink(s: Tensor) -> Tensor:
    return torch.cat([s, torch.full_like(s[..., :1], 0.3)], -1).softmax(-1)[..., :-1]


def logsumexp(s: Tensor) -> Tensor:
    return torch.exp(s - s.logsumexp(-1, keepdim=True))


def quotient(s: Tensor) -> Tensor:
    e = s.exp()
    return e / e.sum(-1, keepdim=True)


def reciprocal(s: Tensor) -> Tensor:
    e = s.exp()
    return e * (1 / e.sum(-1, keepdim=True))


def exponential_twice(s: Tensor) -> Tensor:
    return s.exp() / s.exp().sum(-1, keepdim=True)


def masked_after_the_shift(s: Tensor) -> Tensor:
    """Keys 2 and 40 and more are hidden by a factor, which leaves NaN where it is."""
    e = torch.exp(s - s.amax(-1, keepdim=True)) * SHOWN.float()
    return e / e.sum(-1, keepdim=True)


def masked_and_normalised(s: Tensor) -> Tensor:
    p = s.softmax(-1) * SHOWN
    return p / p.sum(-1, keepdim=True)


def masked_exponentials(s: Tensor) -> Tensor:
    """Of keys that are not shown an infinite one makes the row NaN."""
    e = s.exp() * (torch.arange(M) % 5 != 3).float()
    return e / e.sum(-1, keepdim=True)


def softmax_one(s: Tensor) -> Tensor:
    e = s.exp()
    return e / (1 + e.sum(-1, keepdim=True))


def logsumexp_with_sink(s: Tensor, sink: float = 0.3) -> Tensor:
    s = torch.cat([s, torch.full_like(s[..., :1], sink)], -1)
    return torch.exp(s - s.logsumexp(-1, keepdim=True))[..., :-1]


def logsumexp_with_infinite_sink(s: Tensor) -> Tensor:
    """Zeros: the output is, and dv; ds is NaN."""
    return logsumexp_with_sink(s, inf)


SHOWN = torch.arange(M) % 3 != 2
THROUGHOUT = (
    softmax, log_softmax, shifted, logsumexp_of_shifted, softmax_with_sink, masked_after_the_shift, masked_and_normalised,
)  # fmt: skip
ALONE = (
    logsumexp,
    quotient,
    reciprocal,
    exponential_twice,
    masked_exponentials,
    softmax_one,
    logsumexp_with_sink,
    logsumexp_with_infinite_sink,
)
HIDDEN = torch.arange(N)[:, None] < torch.arange(M)
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "causal": lambda s: s.masked_fill(HIDDEN, -inf),
    "additive": lambda s: s + torch.where(HIDDEN, -1e9, 0.0),
}


def operands() -> list[Tensor]:
    """q, k, v: a head each for one infinite key, two, one beside NaN, one of -inf, one that makes a row of NaN and one of q."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, n, 8, generator=generator) for n in (N, M, M))
    q[..., 0] = q[..., 0].abs() + 0.1  # the sign of an infinite score is that of the key
    k[0, 0, 2, 0] = k[0, 1, 2, 0] = k[0, 1, 40, 0] = k[0, 2, 3, 0] = inf
    k[0, 2, 4, 0] = k[0, 4, 2, 0] = nan
    k[0, 3, 2, 0] = -inf
    q[0, 5, 50, 0] = inf
    return [t.requires_grad_() for t in (q, k, v)]


@pytest.mark.parametrize("way", ["chosen", "tiled", "dense"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("probabilities", [*THROUGHOUT, *ALONE], ids=lambda fn: fn.__name__)
def test_where_nothing_is_finite(probabilities: Callable[[Tensor], Tensor], mask: str, way: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return probabilities(MASKS[mask](q @ k.mT * 0.3)) @ v

    inputs = operands()
    recorder = Recorder()
    with nullcontext() if way == "chosen" else force(way):
        fused = run(compile_always(attention, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(attention, inputs), exactly(attention, inputs))


@pytest.mark.parametrize("probabilities", [*THROUGHOUT, *ALONE[:-1]], ids=lambda fn: fn.__name__)
def test_the_values_of_a_row(probabilities: Callable[[Tensor], Tensor]) -> None:
    """What the two kinds differ in: dv of a head in which one key is infinite."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return probabilities(q @ k.mT * 0.3) @ v

    fused = run(compile_always(attention, Recorder()), operands())
    dv = fused.gradients[2]
    assert dv is not None
    wrong = dv[0, 0].isnan().all(-1)
    assert wrong.tolist() == [probabilities in THROUGHOUT or key == 2 for key in range(M)]
    assert fused.outputs[0][0, 0].isnan().all()
