"""What is proved of a causal mask, however it is written, against what eager hides: each (q, k), at odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from checks import Recorder, compile_always
from fusion_kernels.evaluate import Box, Environment, evaluate
from fusion_kernels.masks import split
from fusion_kernels.program import Node
from fusion_kernels.sdpa import form
from fusion_kernels.tiles import kv_bounds
from spellings.causal import PROVED, UNPROVED, Masked
from torch import Tensor

import fusion_pass
from fusion_pass.site import AttentionSite

SIZES = (1, 63, 129, 197)
# None of these is ATen's: the scores are multiplied by the mask, or the minimum of both.
NO_FORM = {"multiplied_and_added", "multiplied_and_subtracted", "minimum_with_a_mask"}


def described(fn: Masked, n: int, off: int) -> AttentionSite:
    """The site of softmax(fn(q k^T)) v."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fn(q @ k.mT * 0.25, off).softmax(-1) @ v

    compile_always(attention, Recorder("eager"), dynamic=False)(*torch.randn(3, 2, 2, n, 16))
    (site,) = fusion_pass.last_report().fused
    assert site.attention is not None
    return site.attention


def dense(node: Node, n: int) -> Tensor:
    """A condition of positions, (n, n)."""
    box = Box((0, 1), (0, 1), (0, n), (0, n))
    env = Environment(box, {"B": 1, "H": 1, "N": n, "M": n}, [], [], torch.float32, torch.device("cpu"))
    return torch.as_tensor(evaluate([node], env)[0]).expand(1, 1, n, n)[0, 0]


def hidden(fn: Masked, n: int, off: int) -> Tensor:
    """What eager hides of scores that are all 1, (n, n)."""
    return fn(torch.ones(2, 2, n, n), off)[0, 0] <= -1e3


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", PROVED)
def test_what_is_hidden_is_what_eager_hides(name: str, n: int) -> None:
    for off in (0, 1) if n > 1 else (0,):  # of a single key hidden, nothing is left that is made of scores
        found = split(described(PROVED[name], n, off).program.root)
        truth = hidden(PROVED[name], n, off)
        assert torch.equal(truth, torch.ones(n, n).tril(-off) == 0)
        assert not truth.any() if found is None else torch.equal(dense(found.dead, n), truth)


@pytest.mark.parametrize("name", PROVED)
def test_the_facts_and_the_form(name: str) -> None:
    site, twin = (described(PROVED[name], 129, off) for off in (0, 1))
    assert site.mask.text == "causal: k <= q" and site.mask.skips
    assert twin.mask.text == "causal: k <= q - 1" and twin.mask.skips
    found, other = form(site.program), form(twin.program)
    if name in NO_FORM:
        assert found is None
        return
    assert found is not None and found.causal and found.mask is None and found.scale == 0.25
    assert other is not None and not other.causal and other.mask is not None


@pytest.mark.parametrize("name", UNPROVED)
def test_a_number_that_a_score_could_exceed_hides_nothing_for_sure(name: str) -> None:
    site = described(UNPROVED[name], 129, 0)
    assert kv_bounds(site.program) is None and not site.mask.skips
    found = form(site.program)
    assert found is not None and not found.causal and found.mask is not None
    mask = torch.as_tensor(dense(found.mask, 129))
    assert torch.equal(mask, torch.where(torch.ones(129, 129).tril() == 1, 0.0, -1e4 if "minus" in name else -1e9))
    assert not math.isinf(mask.min().item())
