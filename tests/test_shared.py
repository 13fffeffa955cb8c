"""What several attentions share: scores and probabilities (masks: test_shared_masks.py). All of them fuse, or none.

Each row of the table is one body. As it stands it fuses whole; with one of its edits something outside needs what is shared, and
the graph is handed on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from checks import Recorder, Watch, assert_fused, assert_rule, compile_always, exactly, run, sites_text
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusion_pass
from fusion_pass.site import Reason

SCORES, PROBABILITIES, DROPOUT = Reason.SCORES_USED, Reason.PROBABILITIES_USED, Reason.DROPOUT


@dataclass(frozen=True)
class Row:
    fn: Callable[..., Any]  # of (q, k, v, w, edit); w is like v, or like q where `ways`
    sites: int
    stored: bool  # whether a tensor as large as the scores is read by the ops
    ways: bool
    edits: dict[str, tuple[Reason | None, ...]]  # the reasons of its sites; None for one that is fused

    def __str__(self) -> str:
        return self.fn.__name__

    def inputs(self, n: int, m: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return operands(n, m, dtype, self.ways)


def operands(n: int, m: int, dtype: torch.dtype = torch.float32, ways: bool = False) -> list[Tensor]:
    """q (2, 3, n, 16), k and v (2, 3, m, 16), and w (2, 3, m, 24), or (2, 3, n, 24) for attention both ways."""
    generator = torch.Generator().manual_seed(n + m)
    shapes = (2, 3, n, 16), (2, 3, m, 16), (2, 3, m, 16), (2, 3, n if ways else m, 24)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


ROWS: list[Row] = []


def shared(sites: int, *, stored: bool = False, ways: bool = False, **edits: tuple[Reason | None, ...]) -> Callable[[Any], Any]:
    def register(fn: Any) -> Any:
        ROWS.append(Row(fn, sites, stored, ways, edits))
        return fn

    return register


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def window(scores: Tensor, width: int) -> Tensor:
    """What lies further than `width` from the diagonal is masked; key 0 never is."""
    i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
    return scores.masked_fill(((i - j).abs() > width) & (j > 0), -torch.inf)


def extra(edit: str, **values: Tensor) -> tuple[Tensor, ...]:
    """What an edit returns beside the rest, by its name."""
    return (values[edit],) if edit in values else ()


# ---------------------------------------------------------------- one score, several softmaxes


@shared(
    2,
    scores=(SCORES, SCORES),
    total=(SCORES, SCORES),
    masked=(SCORES, SCORES),
    probabilities=(SCORES, PROBABILITIES),
    top_k=(SCORES, Reason.NOT_EXPRESSIBLE),
    queries=(SCORES, Reason.SOFTMAX_DIM),
    detached=(SCORES, Reason.NO_SCORES),
    no_values=(SCORES,),
)
def two_masks(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    scores = scores_of(q, k)
    masked = window(scores, 3)
    first = masked.softmax(-1) @ v
    other = scores.detach() if edit == "detached" else scores
    if edit == "top_k":
        other = other.masked_fill(other < other.topk(1, dim=-1).values - 1, -torch.inf)
    p = other.tanh().softmax(-2 if edit == "queries" else -1)
    more = extra(edit, scores=scores, total=scores.logsumexp(-1), masked=masked, probabilities=p)
    return first, p.sum(-2) if edit == "no_values" else p @ w, *more


@shared(2, ways=True, scores=(SCORES, SCORES), largest=(SCORES, SCORES), keys=(Reason.SOFTMAX_DIM, SCORES))
def two_ways(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """GroundingDINO: queries look at keys, and keys at queries."""
    scores = scores_of(q, k)
    back = scores.transpose(-2, -1).softmax(-2 if edit == "keys" else -1) @ w
    return scores.softmax(-1) @ v, back, *extra(edit, scores=scores, largest=scores.amax())


@shared(2, ways=True, written=(SCORES, SCORES), unwritten=(SCORES, SCORES))
def two_ways_in_place(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """The first softmax reads the scores before they are masked, the second after."""
    scores = scores_of(q, k)
    unwritten = scores * 1.5
    back = unwritten.mT.softmax(-1) @ w
    scores.masked_fill_(torch.arange(k.shape[2]) > 40, -torch.inf)
    return scores.softmax(-1) @ v, back, *extra(edit, written=scores, unwritten=unwritten)


@shared(3, first=(PROBABILITIES, SCORES, SCORES), last=(SCORES, SCORES, PROBABILITIES), view=(SCORES, Reason.MUTATION))
def masked_in_place_between(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """One tensor that holds other scores for each softmax; a write through a view of it is none that can be read back."""
    scores = scores_of(q, k)
    first = scores.softmax(-1)
    if edit == "view":
        scores[..., 0].fill_(0.5)
        return first @ v, scores.softmax(-1) @ w
    scores.masked_fill_(torch.arange(k.shape[2]) > 9, -1e9)
    second = scores.softmax(-1) @ w
    scores.mul_(2)
    last = scores.softmax(-1)
    return first @ v, second, last @ v, *extra(edit, first=first, last=last)


@shared(2, shares=(SCORES, SCORES))
def one_without_gradients(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    scores = scores_of(q, k)
    first = scores.softmax(-1) @ v
    with torch.no_grad():
        return first, (scores * 2).softmax(-1) @ w, *extra(edit, shares=scores.sum(-1))


@shared(3, scores=(SCORES, SCORES, SCORES), columns=(SCORES, PROBABILITIES))
def with_and_without_a_sink(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    scores = scores_of(q, k)
    plain = scores.softmax(-1) @ v
    p = torch.cat([scores, q.new_zeros(*scores.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return plain, p @ w, p @ (v + 1) if edit != "columns" else p, *extra(edit, scores=scores)


@shared(3, masked=(SCORES, SCORES, SCORES))
def under_autocast(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16):
        scores = scores_of(q, k)
        p, masked = scores.softmax(-1), window(scores, 4)
        return p @ v, p @ w, masked.softmax(-1) @ v, *extra(edit, masked=masked)


@shared(2, raw=(SCORES, SCORES), half=(SCORES, None), other=(None, SCORES))
def one_product_two_scales(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """With one of two edits, what is returned is made from the operands again, and is of one site alone."""
    raw = q @ k.mT
    one = q @ k.mT if edit == "half" else raw
    two = q @ k.mT if edit == "other" else raw
    half, other = one * 0.5, two * 0.125
    return half.softmax(-1) @ v, other.softmax(-1) @ w, *extra(edit, raw=raw, half=half, other=other)


@shared(2, stored=True, content=(None, None), total=(SCORES, SCORES), position=(SCORES, SCORES), no_values=(SCORES,))
def each_added_to_the_other(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """LiLT: the sum of two products, in both orders. Both ops make the later one and read the other, which may be returned."""
    content, position = q @ k.mT * 0.25, q[..., :4] @ k[..., :4].mT / 3
    total, p = content + position, (position + content).softmax(-1)
    second = p.sum(-2) if edit == "no_values" else p @ w
    return total.softmax(-1) @ v, second, *extra(edit, content=content, total=total, position=position)


@shared(2, stored=True, content=(None, None), position=(SCORES, SCORES), both=(SCORES, SCORES), alone=(SCORES, SCORES))
def one_added_detached(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """LiLT while it is trained: the second site cannot make what it has no gradient to, so the first leaves that to be stored."""
    position = q[..., :4] @ k[..., :4].mT / 3
    content = q @ k.mT * 0.25
    first = content + (position.detach() if edit == "both" else position)
    second = content if edit == "alone" else content.detach() + position
    alone = content.abs().sum(-1)
    return first.softmax(-1) @ v, second.softmax(-1) @ w, *extra(edit, position=position, content=content, alone=alone)


@shared(2, stored=True, bias=(None, None), later=(None, SCORES))
def a_bias_for_two_layers(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """A product of positions, stored once; each layer makes its own."""
    bias = q[..., ::2] @ k[..., ::2].mT * 0.2
    first = (q @ k.mT * 0.25 + bias).softmax(-1) @ v
    later = bias + q @ (k * 0.5).mT
    return first, later.softmax(-1) @ w, *extra(edit, bias=bias, later=later)


@shared(3, scores=(SCORES, None, SCORES))
def two_of_three(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """A refusal spreads to whom it touches, and to nobody else."""
    scores = scores_of(q, k)
    first = window(scores, 5).softmax(-1) @ v
    apart = (q @ k.mT).softmax(-1) @ (v * 2)
    return first, apart, scores.softmax(-1) @ w, *extra(edit, scores=scores)


# ---------------------------------------------------------------- one softmax, several products


@shared(
    2,
    probabilities=(PROBABILITIES, PROBABILITIES),
    mean=(PROBABILITIES, PROBABILITIES),
    transposed=(PROBABILITIES,),
    squared=(PROBABILITIES, Reason.PROBABILITIES_EDITED),
    detached=(PROBABILITIES,),
    added=(Reason.NO_VALUES,),
    summed=(PROBABILITIES,),
)
def two_products(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    p = scores_of(q, k).softmax(-1)
    first = p @ v
    if edit == "transposed":
        return first, p.mT @ q
    if edit == "summed":
        return first, p.sum(-2)
    if edit == "added":
        return first, torch.baddbmm(first.flatten(0, 1), p.flatten(0, 1), v.flatten(0, 1))
    second = p.square() if edit == "squared" else p.detach() if edit == "detached" else p
    return first, second @ w, *extra(edit, probabilities=p, mean=p.mean(1))


@shared(3, weights=(SCORES,) * 3, quotient=(PROBABILITIES,) * 3)
def three_products_by_hand(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """Softmax by hand, values on either side, and the values of one product are of the other's result's making."""
    scores = scores_of(q, k)
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    p = e / e.sum(-1, keepdim=True)
    first = p @ v
    return first, (w.mT @ p.mT).mT, p @ (v + first.sum(-2, keepdim=True)), *extra(edit, weights=e, quotient=p)


@shared(3, probabilities=(PROBABILITIES, PROBABILITIES, SCORES), scores=(SCORES, SCORES, SCORES))
def products_and_scores(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """One refusal by way of another: the probabilities are returned, so the scores are needed, so the third goes too."""
    scores = scores_of(q, k)
    p = scores.softmax(-1)
    return p @ v, p @ w, window(scores, 2).softmax(-1) @ v, *extra(edit, probabilities=p, scores=scores)


@shared(2, probabilities=(PROBABILITIES, PROBABILITIES))
def a_head_for_two_values(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> tuple[Tensor, ...]:
    """One product has a value for each head, the other one value for all of them."""
    p = scores_of(q, k).softmax(-1)
    return p @ v, p @ w[:, :1], *extra(edit, probabilities=p)


@shared(2, probabilities=(PROBABILITIES, PROBABILITIES))
def in_a_checkpoint(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> Any:
    return checkpoint(lambda *x: two_products(*x, edit=edit), q, k, v, w, use_reentrant=False)


# ---------------------------------------------------------------- the table's tests

SIZES = [(63, 129), (197, 63), (1, 197), (129, 1)]
EDITS = [(row, edit) for row in ROWS for edit in row.edits]


def compiled(fn: Callable[..., Any], recorder: Recorder, edit: str = "", **options: Any) -> Callable[..., Any]:
    return compile_always(lambda *x: fn(*x, edit=edit), recorder, **options)


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_fuse(row: Row, sizes: tuple[int, int]) -> None:
    inputs, recorder = row.inputs(*sizes), Recorder("eager")
    call = compiled(row.fn, recorder, dynamic=False)
    got = run(call, inputs)
    assert_fused(fusion_pass.last_report(), recorder, row.sites)
    assert_rule(got, run(row.fn, inputs), exactly(row.fn, inputs), str(row))
    if row.stored or 1 in sizes:
        return
    recorder.watch = watch = Watch(sizes, 6 * sizes[0] * sizes[1])
    run(call, inputs, watch=watch)
    assert not watch.seen, f"tensors as large as the scores: {watch.seen}"


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_all_fuse_in_other_dtypes(row: Row, dtype: torch.dtype) -> None:
    inputs, recorder = row.inputs(63, 129, dtype), Recorder("eager")
    got = run(compiled(row.fn, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, row.sites)
    assert_rule(got, run(row.fn, inputs), exactly(row.fn, inputs), str(row))


@pytest.mark.parametrize("row", [r for r in ROWS if r.fn is not in_a_checkpoint], ids=str)
def test_all_fuse_with_dynamic_shapes(row: Row) -> None:
    recorder = Recorder("eager")
    call = compiled(row.fn, recorder, dynamic=True)
    for sizes in ((63, 129), (129, 63)):
        inputs = row.inputs(*sizes)
        assert_rule(run(call, inputs), run(row.fn, inputs), exactly(row.fn, inputs), str(row))
    assert_fused(fusion_pass.last_report(), recorder, row.sites)


@pytest.mark.parametrize(("row", "edit"), EDITS, ids=lambda x: str(x))
def test_or_none(row: Row, edit: str) -> None:
    inputs, recorder, untouched = row.inputs(17, 63), Recorder("eager"), Recorder("eager")
    fn = lambda *x: row.fn(*x, edit=edit)
    torch.compile(fn, backend=untouched, fullgraph=True)(*inputs)
    got, eager = run(compiled(row.fn, recorder, edit), inputs), run(fn, inputs)
    report = fusion_pass.last_report()
    assert [site.verdict.reason for site in report.sites] == list(row.edits[edit]), sites_text(report)
    assert_rule(got, eager, exactly(fn, inputs), f"{row}, {edit}")
    if report.fused:
        return
    assert recorder.lines() == untouched.lines(), "the graph of refused sites was changed"
    for (name, x), (_, y) in zip(got.named(), eager.named(), strict=True):
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), f"{name} differs from eager"


def test_each_part_of_the_gradient() -> None:
    """A loss of one product alone has the gradient of that product: the others add nothing."""
    inputs = operands(63, 129)
    for fn in (two_masks, two_products):
        for i in (0, 1):
            part = lambda *x, fn=fn, i=i: fn(*x)[i]
            call = compile_always(fn, Recorder("eager"))
            assert_rule(run(lambda *x, call=call, i=i: call(*x)[i], inputs), run(part, inputs), exactly(part, inputs))


def test_without_gradients() -> None:
    inputs, recorder = [x.detach() for x in operands(63, 129, ways=True)], Recorder("eager")
    got = run(compiled(two_ways, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 2)
    assert_rule(got, run(two_ways, inputs), exactly(two_ways, inputs))


def test_what_nothing_needs_is_no_reader() -> None:
    def unused(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> Tensor:
        p = scores_of(q, k).softmax(-1)
        p @ w, p.sum(-1)  # pyright: ignore[reportUnusedExpression]
        return p @ v

    inputs, recorder = operands(63, 129), Recorder("eager")
    got = run(compiled(unused, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(got, run(unused, inputs), exactly(unused, inputs))


@pytest.mark.parametrize("fn", [two_ways, products_and_scores, each_added_to_the_other], ids=lambda f: f.__name__)
def test_through_inductor(fn: Callable[..., Any]) -> None:
    row = next(r for r in ROWS if r.fn is fn)
    inputs = row.inputs(63, 129)
    torch._dynamo.reset()
    call = torch.compile(fn, backend=fusion_pass.make_backend(when="always"), fullgraph=True)
    assert_rule(run(call, inputs), run(fn, inputs), exactly(fn, inputs))
    assert len(fusion_pass.last_report().fused) == row.sites, sites_text(fusion_pass.last_report())


@pytest.mark.parametrize("swapped", [False, True])
def test_the_product_that_is_computed(swapped: bool) -> None:
    """Of two, the one whose head dim the op takes; else the one that varies over more axes, for the other is smaller."""

    def long(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> Tensor:
        a, b = q.repeat(1, 1, 1, 17) @ k.repeat(1, 1, 1, 17).mT * 0.01, q @ k.mT * 0.25
        return (b + a if swapped else a + b).softmax(-1) @ v

    def without_batch(q: Tensor, k: Tensor, v: Tensor, w: Tensor, edit: str = "") -> Tensor:
        if swapped:
            b, a = q @ k.mT * 0.25, q[:1] @ k[:1].mT
        else:
            a, b = q[:1] @ k[:1].mT, q @ k.mT * 0.25
        return (b + a if swapped else a + b).softmax(-1) @ v

    inputs = operands(63, 17)
    for fn, wanted in ((long, (2, 3, 63, 17)), (without_batch, (1, 3, 63, 17))):
        recorder = Recorder("eager")
        got = run(compiled(fn, recorder), inputs)
        assert_fused(fusion_pass.last_report(), recorder, 1)
        assert_rule(got, run(fn, inputs), exactly(fn, inputs))
        site = fusion_pass.last_report().fused[0].attention
        assert site is not None and site.q.shape == (2, 3, 63, 16)
        assert [capture.shape for capture in site.captures] == [wanted]


def test_scores_that_a_later_layer_adds() -> None:
    """Its queries are made of what the first layer gives: its own product is computed, for it cannot be loaded."""

    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = scores_of(q, k)
        x = first.softmax(-1) @ v
        return (scores_of(x.relu(), x) + first).softmax(-1) @ x

    inputs = operands(63, 63)[:3]
    recorder = Recorder()
    fused = run(compile_always(layers, recorder), inputs)
    report = fusion_pass.last_report()
    assert [s.verdict.reason for s in report.sites] == [SCORES, None], sites_text(report)
    assert_rule(fused, run(layers, inputs), exactly(layers, inputs))


def test_a_refusal_names_the_reader() -> None:
    compiled(products_and_scores, Recorder("eager"), "probabilities")(*operands(17, 63))
    seen = [site.verdict.seen for site in fusion_pass.last_report().sites]
    assert seen[0] == seen[1] == "the graph returns them" and seen[2].endswith(" reads them"), seen


def test_shared_scores_are_counted_once() -> None:
    """Eager keeps the scores for both; what a forward no longer stores is the scores once, and both probabilities."""
    compiled(one_product_two_scales, Recorder("eager"))(*operands(63, 129))
    first, second = (site.attention for site in fusion_pass.last_report().sites)
    assert first is not None and second is not None
    size = 2 * 3 * 63 * 129 * 4
    assert (first.bytes_saved, second.bytes_saved) == (3 * size, 2 * size)  # q k^T, its multiple, its softmax
