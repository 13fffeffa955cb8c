"""What must not fuse: refused for the right reason, the graph handed on unchanged, the result bit for bit eager's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import Recorder, Result, assert_rule, compile_always, exactly, run, sites_text
from spellings.table import T, make_input, qkv, t
from torch import Tensor, nn

import fusion_pass
from fusion_pass.site import Reason


@dataclass(frozen=True)
class Case:
    fn: Callable[..., Any]
    inputs: tuple[T, ...]
    reasons: tuple[Reason | tuple[Reason, ...], ...]  # of each site (or one of several); () where it may fuse, if it stays right

    def __str__(self) -> str:
        return self.fn.__name__

    def make(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [make_input(x, generator, torch.float32) for x in self.inputs]


CASES: list[Case] = []


def refused(*reasons: Reason | tuple[Reason, ...], inputs: tuple[T, ...] = qkv(n=17, m=17)) -> Callable[[Any], Any]:
    def register(fn: Any) -> Any:
        CASES.append(Case(fn, inputs, reasons))
        return fn

    return register


# An op that mixes scores under the softmax: that no product is seen, or that the function is not pointwise, are both true.
OPAQUE = (Reason.NOT_EXPRESSIBLE, Reason.NO_SCORES)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


# ---------------------------------------------------------------- the probabilities are used, or changed


@refused(Reason.PROBABILITIES_USED)
def probabilities_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores_of(q, k).softmax(-1)
    return p @ v, p


@refused(Reason.PROBABILITIES_USED)
def probabilities_in_a_loss(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores_of(q, k).softmax(-1)
    return p @ v, -(p * (p + 1e-6).log()).sum(-1).mean()


@refused(Reason.PROBABILITIES_USED)
def averaged_weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = F.dropout(scores_of(q, k).softmax(-1), 0.0)
    return p @ v, p.mean(1)


@refused(Reason.PROBABILITIES_USED)
def cast_probabilities_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores_of(q, k).softmax(-1).to(torch.float64)
    return p.float() @ v, p


@refused(Reason.PROBABILITIES_EDITED)
def talking_heads_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores_of(q, k).softmax(-1)
    mix = torch.ones(3, 3) + torch.eye(3)
    return torch.einsum("bhqk,hg->bgqk", p, mix) @ v


@refused(Reason.PROBABILITIES_EDITED)
def top_k_of_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores_of(q, k).softmax(-1)
    kept = p >= p.topk(4, dim=-1).values[..., -1:]
    p = torch.where(kept, p, 0.0)
    return (p / p.sum(-1, keepdim=True)) @ v


@refused(Reason.PROBABILITIES_EDITED)
def threshold_of_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.threshold(scores_of(q, k).softmax(-1), 0.05, 0.0) @ v


@refused(Reason.PROBABILITIES_EDITED)
def small_probabilities_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores_of(q, k).softmax(-1)
    return p.masked_fill(p < 0.05, 0.0) @ v


@refused(Reason.PROBABILITIES_EDITED)
def floor_of_masked_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dead = torch.ones(17, 17, dtype=torch.bool).triu(1)
    return scores_of(q, k).softmax(-1).masked_fill(dead, 1e-9) @ v


@refused(Reason.PROBABILITIES_EDITED)
def probabilities_squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores_of(q, k).softmax(-1)
    return (p * p) @ v


@refused(Reason.PROBABILITIES_EDITED)
def probabilities_normalised_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores_of(q, k).softmax(-1).tril()
    return (p / p.sum(-1, keepdim=True)) @ v


@refused(Reason.PROBABILITIES_EDITED)
def two_probabilities_chosen_from(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dead = torch.ones(17, 17, dtype=torch.bool).triu(1)
    return torch.where(dead, scores_of(q, k).softmax(-1), scores_of(k, q).softmax(-1)) @ v


@refused(Reason.PROBABILITIES_EDITED)
def choice_of_a_quotient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row with +inf is NaN at that key alone, which the choice may stop or not."""
    e = scores_of(q, k).exp()
    return (e / e.sum(-1, keepdim=True)).tril() @ v


@refused(Reason.PROBABILITIES_EDITED)
def guard_with_another_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1).nan_to_num(nan=1e-3) @ v


@refused(Reason.PROBABILITIES_EDITED)
def probabilities_plus_constant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) + 1e-3) @ v


@refused(Reason.PROBABILITIES_EDITED)
def two_dropouts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(F.dropout(scores_of(q, k).softmax(-1), 1e-30) * 2, 1e-30) @ v


@refused(Reason.PROBABILITIES_EDITED, inputs=tuple(t(2, 3, 17, 16, dtype=torch.float64) for _ in range(3)))
def number_that_float64_does_not_lose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """1 + 1e-9 is 1 in fp32 alone."""
    e = torch.exp(scores_of(q, k) - scores_of(q, k).amax(-1, keepdim=True))
    return (e / (e.sum(-1, keepdim=True) + 1e-9)) @ v


@refused(Reason.PROBABILITIES_EDITED)
def detached_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No gradient goes to q and k: fusing would make one."""
    return scores_of(q, k).softmax(-1).detach() @ v


@refused()
def detached_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).detach().softmax(-1) @ v


@refused()
def probabilities_under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        p = scores_of(q, k).softmax(-1)
    return p @ v


@refused()
def keys_under_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        columns = k.mT * 0.25
    return (q @ columns).softmax(-1) @ v


@refused()
def bias_detached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k) + (q.sum(-1, keepdim=True) * k.sum(-1).unsqueeze(-2)).detach()).softmax(-1) @ v


@refused()
def probabilities_of_two_products(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores_of(q, k).softmax(-1)
    return p @ v, p @ v.square()


# ---------------------------------------------------------------- a dropout mask that is not this attention's own


def noise_like(p: Tensor) -> Tensor:
    return torch.empty_like(p).bernoulli_(0.75).div_(0.75)


@refused(Reason.DROPOUT, Reason.DROPOUT)
def mask_of_two_attentions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One bit is read at (q, k) by the first and at (k, q) by the second: the op's bits are not."""
    p = scores_of(q, k).softmax(-1)
    noise = noise_like(p)
    return (p * noise) @ v + (scores_of(k, q).softmax(-1) * noise.mT) @ v


@refused(Reason.DROPOUT, Reason.DROPOUT)
def mask_of_ones_of_two_attentions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores_of(q, k).softmax(-1)
    noise = F.dropout(torch.ones_like(p), 0.25)
    return (p * noise) @ v + (scores_of(k, q).softmax(-1) * noise.flip(1)) @ v


@refused(Reason.DROPOUT)
def mask_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p = scores_of(q, k).softmax(-1)
    noise = noise_like(p)
    return (p * noise) @ v, noise


@refused(Reason.DROPOUT)
def mask_shared_by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * noise_like(v.new_empty(2, 1, 17, 17))) @ v


@refused(Reason.DROPOUT)
def whole_queries_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * noise_like(v.new_empty(2, 3, 17, 1))) @ v


@refused()
def dropout_before_the_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One map of attention for three heads, and one mask."""
    p = F.dropout((q[:, 0] @ k[:, 0].mT * 0.25).softmax(-1), 0.25)
    return p[:, None].expand(2, 3, 17, 17) @ v


@refused(Reason.PROBABILITIES_EDITED)
def mask_of_another_rate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kept at 0.75, divided by 0.5."""
    p = scores_of(q, k).softmax(-1)
    return (p * torch.empty_like(p).bernoulli_(0.75).div_(0.5)) @ v


# ---------------------------------------------------------------- the scores are used, or are no function of q.k


@refused(Reason.SCORES_USED)
def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v, scores


@refused(Reason.SCORES_USED)
def raw_product_used(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raw = q @ k.mT
    return (raw * 0.25).softmax(-1) @ v, raw.square().mean()


@refused(Reason.SCORES_USED)
def entropy_by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@refused(Reason.NOT_EXPRESSIBLE)
def top_k_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    last = scores.topk(4, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < last, -torch.inf).softmax(-1) @ v


@refused(OPAQUE)
def scores_normalised_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.layer_norm(scores_of(q, k), (17,)).softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def scores_minus_their_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Harmless where every score is finite; the mean of a row with -inf is -inf, and the row then NaN."""
    scores = scores_of(q, k).masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), -torch.inf)
    return (scores - scores.mean(-1, keepdim=True).detach()).softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def scores_minus_twice_their_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - 2 * scores.amax(-1, keepdim=True)).softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def scores_minus_the_largest_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - scores.amax()).softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def maximum_minus_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A row with +inf: NaN here; -scores has a masked key there."""
    scores = scores_of(q, k)
    return (scores.amax(-1, keepdim=True) - scores).softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def function_of_shifted_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - scores.amax(-1, keepdim=True)).tanh().softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def fill_after_the_shift(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fill is not shifted with the scores."""
    scores = scores_of(q, k)
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1), -1.0).softmax(-1) @ v


@refused(OPAQUE)
def cumulative_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.logsigmoid(scores_of(q, k)).cumsum(-1).softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def scores_shifted_by_roll(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The score of a neighbour: not a function of this element's q.k."""
    scores = scores_of(q, k)
    return (scores + scores.roll(1, -1)).softmax(-1) @ v


@refused(Reason.NOT_EXPRESSIBLE)
def scores_and_their_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores + scores.mT).softmax(-1) @ v


@refused(OPAQUE)
def talking_heads_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.ones(3, 3) + torch.eye(3)
    return torch.einsum("bhqk,hg->bgqk", scores_of(q, k), mix).softmax(-1) @ v


@refused()
def two_products_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeBERTa, Transformer-XL: content and position scores."""
    return (q @ k.mT + k @ q.mT * 0.5).softmax(-1) @ v


@refused()
def three_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * (v @ v.mT) * 0.1).softmax(-1) @ v


# ---------------------------------------------------------------- the softmax is another one, or this is no attention


@refused(Reason.SOFTMAX_DIM)
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-2) @ v


@refused(Reason.SOFTMAX_DIM)
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(1) @ v


@refused(Reason.SOFTMAX_DIM)
def softmax_over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(0) @ v


@refused(Reason.SOFTMAX_DIM)
def values_summed_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1).mT @ v


@refused()
def softmax_of_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1).softmax(-1) @ v


@refused(Reason.NO_SCORES, inputs=(t(5, 17), t(17, 8)))
def mixture_of_vectors(gate: Tensor, x: Tensor) -> Tensor:
    return gate.softmax(-1) @ x


@refused(Reason.NO_SCORES, inputs=(t(5, 17, dtype=torch.bfloat16), t(17, 8, dtype=torch.bfloat16)))
def mixture_of_vectors_bf16(gate: Tensor, x: Tensor) -> Tensor:
    """Each step is rounded, which is no edit of the probabilities."""
    e = (gate - gate.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ x


@refused()
def weights_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No values: no attention, and no line in the report."""
    return scores_of(q, k).softmax(-1).sum(1)


@refused(Reason.NO_VALUES, inputs=(*qkv(n=17), t(2, 3, 17, 16)))
def product_added_to(q: Tensor, k: Tensor, v: Tensor, residual: Tensor) -> Tensor:
    p = scores_of(q, k).softmax(-1)
    return torch.baddbmm(residual.flatten(0, 1), p.flatten(0, 1), v.flatten(0, 1))


@refused()
def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@refused(Reason.HEAD_DIM, inputs=qkv(b=1, h=1, n=17, d=257))
def head_dim_over_the_limit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1) @ v


# ---------------------------------------------------------------- writes in place that the description cannot see


@refused(Reason.MUTATION)
def scores_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores[..., 0].fill_(1.0)
    return scores.softmax(-1) @ v


@refused(Reason.MUTATION)
def scores_assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores[:, :, 3:5] = 0.5
    return scores.softmax(-1) @ v


@refused(Reason.MUTATION)
def scores_assigned_by_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An index of bools is a mask; this is none."""
    scores = scores_of(q, k)
    scores[..., torch.tensor([1, 4])] = -1e9
    return scores.softmax(-1) @ v


@refused(Reason.MUTATION)
def probabilities_written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        p = scores_of(q, k).softmax(-1)
        p[..., 0].zero_()
    return p @ v


@refused()
def query_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores were made from the old query; reading q where the site ends would see the new one."""
    with torch.no_grad():
        q = q.clone()
        rows = q.view(-1)
        scores = scores_of(q, k)
        rows.mul_(3.0)
        return scores.softmax(-1) @ v


@refused()
def keys_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k.clone()
        p = scores_of(q, k).softmax(-1)
        k[:, 0] = 0.0
        return p @ v + k


@refused()
def query_written_whole_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        q = q.clone()
        scores = scores_of(q, k)
        q.mul_(3.0)
        return scores.softmax(-1) @ v + q


@refused()
def values_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    p = scores_of(q, k).softmax(-1)
    v.transpose(1, 2).mul_(2.0)
    return p @ v


@refused()
def mask_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(17, 17)
    scores = scores_of(q, k) + bias
    bias.view(-1)[::2] = -torch.inf
    return scores.softmax(-1) @ v + bias.exp().sum()


@refused()
def mask_written_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(17, 17)
    bias[:, 5:] = -torch.inf
    bias[3].zero_()
    return (scores_of(q, k) + bias).softmax(-1) @ v


# ----------------------------------------------------------------


def _bitwise(a: Result, b: Result) -> None:
    for (name, x), (_, y) in zip(a.named(), b.named(), strict=True):
        assert (x is None) == (y is None), name
        assert x is None or torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0)), f"{name} differs from eager"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(case: Case) -> None:
    check(case, dynamic=False)


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_refused_with_dynamic_shapes(case: Case) -> None:
    check(case, dynamic=True)


def check(case: Case, *, dynamic: bool) -> None:
    inputs, recorder, untouched = case.make(), Recorder("eager"), Recorder("eager")
    torch.compile(case.fn, backend=untouched, fullgraph=True, dynamic=dynamic)(*inputs)
    torch.manual_seed(0)
    eager = run(case.fn, inputs)
    torch.manual_seed(0)
    got = run(compile_always(case.fn, recorder, dynamic=dynamic), inputs)
    report = fusion_pass.last_report()
    assert_rule(got, eager, exactly(case.fn, inputs), str(case))
    if not case.reasons:
        return
    assert len(report.sites) == len(case.reasons), sites_text(report)
    for site, reasons in zip(report.sites, case.reasons, strict=True):
        assert site.verdict.reason in (reasons if isinstance(reasons, tuple) else (reasons,)), sites_text(report)
    assert all(site.verdict.seen for site in report.sites), f"a refusal says what was seen{sites_text(report)}"
    assert recorder.lines() == untouched.lines(), "the graph of a refused site was changed"
    _bitwise(got, eager)


def test_weights_of_multi_head_attention_returned() -> None:
    """The averaged weights are an output: nothing fuses, and the call is still one node."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(48, 3, batch_first=True)
    recorder = Recorder("eager")
    x = torch.randn(2, 17, 48)
    compiled = compile_always(lambda x: module(x, x, x, need_weights=True), recorder)
    torch.testing.assert_close(compiled(x), module(x, x, x, need_weights=True), rtol=0, atol=0)
    report = fusion_pass.last_report()
    assert not report.fused and [s.verdict.reason for s in report.sites] == [Reason.PROBABILITIES_USED], sites_text(report)


def test_a_refused_site_beside_a_fused_one() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first = scores_of(q, k).softmax(-1) @ v
        p = scores_of(first, k).softmax(-1)
        return p @ v, p

    inputs, recorder = CASES[0].make(), Recorder("eager")
    fused = run(compile_always(both, recorder), inputs)
    report = fusion_pass.last_report()
    assert [s.verdict.fused for s in report.sites] == [True, False], sites_text(report)
    assert_rule(fused, run(both, inputs), exactly(both, inputs))


def test_small_sites_do_not_pay() -> None:
    """The default keeps its hands off a site where a fused kernel gains nothing, and says so."""

    def small(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores_of(q, k).tanh().softmax(-1) @ v  # ATen has no kernel for it

    generator = torch.Generator().manual_seed(3)
    inputs = [make_input(x, generator, torch.float32) for x in qkv(b=1, h=1, n=2, d=4)]
    untouched, recorder = Recorder("eager"), Recorder("eager")
    torch.compile(small, backend=untouched)(*inputs)
    torch._dynamo.reset()
    torch.compile(small, backend=fusion_pass.make_backend(inner=recorder))(*inputs)
    report = fusion_pass.last_report()
    assert [s.verdict.reason for s in report.sites] == [Reason.NOT_PROFITABLE], sites_text(report)
    assert recorder.lines() == untouched.lines()


def test_vmap_and_custom_functions_stay_right() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 3 * gradient * ctx.saved_tensors[0]  # not the derivative, so that its use shows

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inside = torch.vmap(lambda a, b, c: scores_of(a, b).softmax(-1) @ c)(q, k, v)
        return scores_of(Square.apply(q), k).softmax(-1) @ v + inside

    inputs = CASES[0].make()
    fused = run(compile_always(fn, Recorder("eager")), inputs)
    assert_rule(fused, run(fn, inputs), exactly(fn, inputs))


def test_a_sum_of_many_softmaxes() -> None:
    """Each would be an op of its own."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sum((q @ k.mT * i).softmax(-1) for i in range(1, 10)) @ v

    q, k, v = (torch.randn(2, 3, 63, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    compile_always(fn, Recorder("eager"))(q, k, v)
    report = fusion_pass.last_report()
    assert not report.fused and {s.verdict.reason for s in report.refused} == {Reason.PROBABILITIES_EDITED}
