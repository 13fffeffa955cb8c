"""One dropout mask for several attentions, or several masks for one softmax: the bits, the rule, and what must not fuse."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run, sites_text
from dropped import assert_rate, kept
from test_shared import DROPOUT, PROBABILITIES, SCORES, compiled, extra, operands, scores_of
from torch import Tensor

import fusion_pass
from fusion_pass.site import Reason

P = 0.25


def dropped(p: Tensor) -> Tensor:
    return F.dropout(p, P)


def noise_like(p: Tensor) -> Tensor:
    return torch.empty_like(p).bernoulli_(1 - P).div_(1 - P)


def one_mask(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    p = dropped(scores_of(q, k).softmax(-1))
    second = p.mT.contiguous().mT if edit == "copied" else p
    return p @ v, second @ w, *extra(edit, probabilities=p)


def one_mask_by_hand(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """The second product is asked for first, and is the one that the graph makes first."""
    p = scores_of(q, k).softmax(-1)
    noise = noise_like(p)
    second = (p * noise) @ w
    return (noise * p) @ v, second, *extra(edit, mask=noise, kept=noise > 0)


def one_mask_for_two_softmaxes(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    scores = scores_of(q, k)
    first, second = scores.softmax(-1), (scores * 2).softmax(-1)
    noise = F.dropout(torch.ones_like(first), P)
    other = noise.flip(0) if edit == "flipped" else noise[:, :1] if edit == "one head" else noise
    second = second * other
    if edit == "edited":
        second = second.cumsum(-1)
    return (first * noise) @ v, second @ w, *extra(edit, mask=noise)


def in_a_chain(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> list[Tensor]:
    """Each attention shares its mask with one neighbour and its scores with the other."""
    scores = [q @ k.mT * i for i in (0.5, 0.25, 1.0, 2.0)]
    outs = [scores[0 if edit == "first" else -1].clone()] if edit else []
    for first, second in pairwise(scores):
        noise = noise_like(first)
        outs += [(first.softmax(-1) * noise) @ v, (second.softmax(-1) * noise) @ w]
    return outs


def two_masks_of_one_softmax(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    p = scores_of(q, k).softmax(-1)
    return dropped(p) @ v, dropped(p) @ w


def one_of_two_is_dropped(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    p = scores_of(q, k).softmax(-1)
    return dropped(p) @ v, p @ w


def under(keeps: tuple[Tensor, Tensor], second_scale: float = 1.0) -> Callable[..., Any]:
    """Two eager attentions that keep what they are told."""

    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores_of(q, k)
        first, second = scores.softmax(-1), (scores * second_scale).softmax(-1)
        first, second = (p * keep.to(p.dtype) / rate(keep) for p, keep in zip((first, second), keeps, strict=True))
        return first @ v, second @ w

    return attend


def rate(keep: Tensor) -> float:
    return 1.0 if bool(keep.all()) else 1 - P


@pytest.mark.parametrize("sizes", [(129, 63), (63, 197), (1, 197)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fn", [one_mask, one_mask_by_hand, one_mask_for_two_softmaxes], ids=lambda f: f.__name__)
def test_one_mask(fn: Callable[..., Any], dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    """Both keep the same probabilities, at the wanted rate; and under that mask the rule holds for values and gradients."""
    first, second = check_masks(fn, sizes, dtype, 2.0 if fn is one_mask_for_two_softmaxes else 1.0)
    assert torch.equal(first, second)
    assert_rate(first, P, causal=False)


def test_a_chain_fuses_whole() -> None:
    recorder = Recorder("eager")
    run(compiled(in_a_chain, recorder), operands(63, 17))
    assert_fused(fusion_pass.last_report(), recorder, 6)
    seeds = [n for gm in recorder.graphs for n in gm.graph.nodes if n.target is torch.randint]
    assert [len(n.users) for n in seeds] == [2, 2, 2]


def test_two_masks() -> None:
    first, second = check_masks(two_masks_of_one_softmax, (129, 63), torch.float32)
    both = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1]
    assert abs(float(both)) < 5 / first.numel() ** 0.5
    for keep in (first, second):
        assert_rate(keep, P, causal=False)


def test_one_of_two_is_dropped() -> None:
    first, second = check_masks(one_of_two_is_dropped, (129, 63), torch.float32)
    assert_rate(first, P, causal=False)
    assert bool(second.all())


def check_masks(fn: Callable[..., Any], sizes: tuple[int, int], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The masks of both attentions of `fn`, which have to fuse."""
    inputs, recorder = operands(*sizes, dtype), Recorder("aot_eager")
    call = compiled(fn, recorder, dynamic=False)
    q, k, v, w = inputs
    first = kept(lambda q, k, v: call(q, k, v, w)[0], q, k, v, 1)
    second = kept(lambda q, k, w: call(q, k, v, w)[1], q, k, w, 1)
    assert_fused(fusion_pass.last_report(), recorder, 2)
    other = kept(lambda q, k, v: call(q, k, v, w)[0], q, k, v, 2)
    assert not torch.equal(first, other), "another seed gives the same mask"

    def seeded(*x: Tensor) -> Any:
        torch.manual_seed(1)
        return call(*x)

    eager = under((first, second), scale)
    assert_rule(run(seeded, inputs), run(eager, inputs), exactly(eager, inputs))
    return first, second


DROPPED = [
    (one_mask, "probabilities", (PROBABILITIES, PROBABILITIES)),
    (one_mask_by_hand, "mask", (DROPOUT, DROPOUT)),
    (one_mask_by_hand, "kept", (DROPOUT, DROPOUT)),
    (one_mask_for_two_softmaxes, "mask", (DROPOUT, DROPOUT)),
    (one_mask_for_two_softmaxes, "flipped", (DROPOUT, DROPOUT)),
    (one_mask_for_two_softmaxes, "one head", (DROPOUT, DROPOUT)),
    (one_mask_for_two_softmaxes, "edited", (DROPOUT, Reason.PROBABILITIES_EDITED)),
    (in_a_chain, "first", (SCORES, DROPOUT, SCORES, DROPOUT, SCORES, DROPOUT)),
    (in_a_chain, "last", (DROPOUT, SCORES, DROPOUT, SCORES, DROPOUT, SCORES)),
]


@pytest.mark.parametrize(
    ("fn", "edit", "reasons"), DROPPED, ids=lambda x: getattr(x, "__name__", x if isinstance(x, str) else "")
)
def test_a_mask_that_is_not_shared_alike(fn: Callable[..., Any], edit: str, reasons: tuple[Reason, ...]) -> None:
    """Refused, and bit for bit what eager draws."""
    inputs, recorder = operands(63, 17), Recorder("eager")
    call = compiled(fn, recorder, edit)
    results = []
    for f in (call, lambda *x: fn(*x, edit=edit)):
        torch.manual_seed(3)
        results.append(run(f, inputs))
    report = fusion_pass.last_report()
    assert [site.verdict.reason for site in report.sites] == list(reasons), sites_text(report)
    for (name, x), (_, y) in zip(*(r.named() for r in results), strict=True):
        assert x is not None and y is not None and torch.equal(x, y), f"{name} differs from eager"


def test_a_copy_of_what_was_dropped_has_its_mask() -> None:
    recorder = Recorder("eager")
    compiled(one_mask, recorder, "copied")(*operands(63, 17))
    assert_fused(fusion_pass.last_report(), recorder, 2)
    seeds = [n for gm in recorder.graphs for n in gm.graph.nodes if n.target is torch.randint]
    assert len(seeds) == 1 and len(seeds[0].users) == 2


def test_one_query_of_one_head() -> None:
    """An index of a dim of one is 0, however each product has come to it."""

    def both(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, Tensor]:
        p = dropped(scores_of(q, k).softmax(-1))
        return p @ v, (w.mT @ p.mT).mT

    recorder = Recorder("eager")
    q, k, v, w = (x.detach()[:1, :1].clone() for x in operands(1, 197))
    compiled(both, recorder)(q, k, v, w)
    assert_fused(fusion_pass.last_report(), recorder, 2)


def of_two_groupings(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, Tensor]:
    """The values of the first product are two heads repeated, which divides the heads' axis; those of the second are four."""
    k = k[:, :2].repeat_interleave(2, dim=1) * 0.5
    v = v[:, :2].repeat_interleave(2, dim=1)
    q = torch.cat([q, q[:, :1] * 0.5], 1)
    p = dropped(scores_of(q, k).softmax(-1))
    other = p.unflatten(1, (2, 2)).mT.contiguous().mT.transpose(1, 2).flatten(1, 2) if edit == "reordered" else p
    return p @ v, other @ (v[..., :4] * 2)


@pytest.mark.parametrize("edit", ["", "reordered"])
def test_a_mask_is_read_in_one_order_whatever_the_heads_are_merged_to(edit: str) -> None:
    """The row of the op is b * H + h, in [4, 2, N, D] heads and in [2, 4, N, D]; but not if the heads are in another order."""
    recorder = Recorder("eager")
    first, second = compiled(of_two_groupings, recorder, edit)(*operands(63, 17))
    if edit:
        assert [site.verdict.reason for site in fusion_pass.last_report().sites] == [DROPOUT, DROPOUT]
        return
    assert_fused(fusion_pass.last_report(), recorder, 2)
    torch.testing.assert_close(second, first[..., :4] * 2)


def test_a_difference_of_two_softmaxes_that_is_dropped() -> None:
    """One mask for both terms: with values of the unit matrix it is read off, and what is kept is the difference."""

    def difference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1) - 0.5 * (q @ k.mT * 2).softmax(-1)
        return F.dropout(p, P) @ v

    q, k, _, _ = operands(63, 129)
    v = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1)
    recorder = Recorder("eager")
    fused = compile_always(difference, recorder)
    torch.manual_seed(3)
    out = fused(q, k, v).detach()
    assert_fused(fusion_pass.last_report(), recorder, 2)
    keep = out != 0
    assert_rate(keep, P, causal=False)
    exact = (q @ k.mT).double().softmax(-1) - 0.5 * (q @ k.mT * 2).double().softmax(-1)
    torch.testing.assert_close(out.double(), torch.where(keep, exact / (1 - P), 0.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("returned", [False, True])
def test_a_mask_of_the_second_term_alone(returned: bool) -> None:
    """Whoever else reads it has to read the bits that the attention drops by: then nothing is fused."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        first, second = (q @ k.mT).softmax(-1), (q @ k.mT * 2).softmax(-1)
        noise = noise_like(second)
        return (first - second * noise) @ v, *((noise,) if returned else ())

    q, k, v, _ = operands(63, 129)
    compile_always(fn, Recorder("eager"))(q, k, v)
    report = fusion_pass.last_report()
    assert len(report.fused) == (0 if returned else 2), sites_text(report)
    assert {site.verdict.reason for site in report.refused} == ({DROPOUT} if returned else set())
