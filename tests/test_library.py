"""scaled_dot_product_attention: read as what it computes, replaced where that pays, and only the call as a whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run
from torch import Tensor

import fusion_pass
from fusion_pass import library
from fusion_pass.library import in_products, why_left
from fusion_pass.site import Reason

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_where_it_is_left_alone() -> None:
    many, few, some = sympy.Integer(256), sympy.Integer(255), sympy.Symbol("s0", integer=True, positive=True)
    plain = "torch has a kernel for scaled_dot_product_attention without a mask"
    assert why_left("plain", CPU, many) == why_left("plain", GPU, many) == plain
    assert why_left("masked", CPU, many) == "torch has a kernel for scaled_dot_product_attention on a CPU"
    assert why_left("masked", GPU, many) is None
    assert why_left("masked", GPU, few) == "255 keys are too few to replace a kernel of torch"
    assert why_left("masked", GPU, some) is None
    assert why_left("", CPU, few) is None and why_left("", GPU, few) is None  # written out, or in products by torch itself


def inputs(bias_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 63, 16, generator=generator, requires_grad=True) for _ in range(3))
    return [q, k, v, torch.randn(2, 1, 63, 63, generator=generator, requires_grad=bias_grad)]


def profitable(fn: Callable[..., Tensor], *tensors: Tensor) -> tuple[Recorder, fusion_pass.report.Report]:
    torch._dynamo.reset()
    recorder = Recorder("eager")
    torch.compile(fn, backend=fusion_pass.make_backend(inner=recorder), fullgraph=True)(*tensors)
    return recorder, fusion_pass.last_report()


def called(recorder: Recorder) -> list[object]:
    return [n.target for gm in recorder.graphs for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_call_that_stays_is_one_call(masked: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask if masked else None)

    recorder, report = profitable(fn, *inputs())
    (site,) = report.refused
    assert site.verdict.reason is Reason.NOT_PROFITABLE
    assert site.verdict.seen == why_left("masked" if masked else "plain", CPU, sympy.Integer(63))
    assert called(recorder) == [F.scaled_dot_product_attention]


def test_what_torch_runs_in_products_is_a_site_like_any_other() -> None:
    """A bias with a gradient is more than torch's kernel on a CPU takes: the site is left alone for its size."""

    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias)

    _, report = profitable(fn, *inputs(bias_grad=True))
    (site,) = report.refused
    assert site.verdict.reason is Reason.NOT_PROFITABLE and "scores" in site.verdict.seen


def test_a_view_of_the_result_as_torchs_kernels_leave_it() -> None:
    """Of heads that lie beside each other torch's result can be viewed as (B, N, H * D), and ours."""

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (3, 16)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).view(2, 63, 48)

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 63, 48, generator=generator, requires_grad=True) for _ in range(3)]
    given.append(torch.rand(2, 1, 63, 63, generator=generator) < 0.8)
    recorder = Recorder("eager")
    fused = run(compile_always(fn, recorder), given)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(fn, given), exactly(fn, given))


@pytest.mark.parametrize("low", [-0.5, float("-inf")])
def test_numbers_that_the_caller_chose_are_a_mask_of_numbers(low: float) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, torch.where(mask > 0, 0.0, low).expand(2, 3, 63, 63))

    given = inputs()
    recorder = Recorder("eager")
    fused = run(compile_always(fn, recorder), given)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(fn, given), exactly(fn, given))


@torch.compiler.allow_in_graph
def softmax_of_a_masked_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, low: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias.masked_fill(bias > 1, low).expand(2, 3, 63, 63))


@torch.compiler.allow_in_graph
def softmax_of_a_choice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, low: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, torch.where(bias > 1, low, 0.0))


@pytest.mark.parametrize("low", [-0.5, float("-inf")])
@pytest.mark.parametrize("composite", [softmax_of_a_masked_bias, softmax_of_a_choice])
def test_numbers_that_are_chosen_in_the_same_call(composite: Callable[..., Tensor], low: float) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return composite(q, k, v, mask, low)

    given = inputs()
    recorder = Recorder("eager")
    fused = run(compile_always(fn, recorder), given)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(fn, given), exactly(fn, given))


def test_a_bool_mask_is_a_choice() -> None:
    """Whatever torch makes of it for its kernel."""
    recorder = Recorder("eager")
    given = inputs()
    compile_always(lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask > 0), recorder)(*given)
    (site,) = fusion_pass.last_report().fused
    assert site.attention is not None
    assert site.attention.formula == "softmax(where(mask[b, 0, q, k] > 0, q k^T / 4, -inf))"


@pytest.mark.parametrize(("dim", "pads"), [(0, (0, 0, 0, 0, 0, 0, 0, 2)), (2, (0, 0, 0, 4)), (3, (0, 8))])
def test_a_part_of_the_product_is_not_all_of_it(monkeypatch: pytest.MonkeyPatch, dim: int, pads: tuple[int, ...]) -> None:
    """As flash attention on a GPU pads odd head dims, and cuts them from the result inside of one call."""

    def padded(query: Tensor, key: Tensor, value: Tensor, **how: object) -> Tensor:
        size = (*query.shape[:3], value.shape[3])[dim]
        query, key = F.pad(query, pads), F.pad(key, pads if dim != 2 else ())
        value = F.pad(value, pads if dim != 2 else ())
        return in_products(query, key, value, **how).narrow(dim, 0, size)  # type: ignore[arg-type]

    monkeypatch.setattr(library, "in_products", padded)
    given, recorder = inputs(), Recorder("eager")

    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.25)

    result = run(compile_always(fn, recorder), given)
    (site,) = fusion_pass.last_report().refused
    assert site.verdict.reason is Reason.LAYOUT and site.verdict.needed == "the whole product"
    assert_rule(result, run(fn, given), exactly(fn, given))
