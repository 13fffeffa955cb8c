"""scaled_dot_product_attention on a GPU: whichever kernel torch would choose, read as the same; replaced where it has a mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import Recorder, assert_rule, compile_always, exactly, run
from torch import Tensor

import fusion_pass
from fusion_pass.site import Reason

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def qkv(b: int, h: int, n: int, m: int, d: int, dtype: torch.dtype, kv: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, n, d), (b, kv or h, m, d), (b, kv or h, m, d)]
    return [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]


def hidden(*shape: int) -> Tensor:
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.75
    kept[..., 0] = True
    return kept.cuda()


CALLS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "bool mask": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
    "padding": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m[:, :, :1]),
    "float mask": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, torch.where(m, 0.5, -torch.inf).to(q.dtype)),
    "scale": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3),
    "grouped": lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], m, enable_gqa=True),
    "of (B, N, H, D)": lambda q, k, v, m: F.scaled_dot_product_attention(
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), m
    ).transpose(1, 2).flatten(2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [20, 64])
@pytest.mark.parametrize("name", CALLS)
def test_read_as_what_it_computes(name: str, d: int, dtype: torch.dtype) -> None:
    fn, x = CALLS[name], [*qkv(2, 4, 63, 129, d, dtype), hidden(2, 1, 63, 129)]
    recorder = Recorder("eager")
    fused = run(compile_always(fn, recorder), x)
    report = fusion_pass.last_report()
    if d != 20:  # a head dim that torch's kernel pads, and cuts from its result, may be left alone
        assert len(report.fused) == 1 and not report.refused, str(report)
    assert_rule(fused, run(fn, x), exactly(fn, x), name)


def test_a_learned_bias() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias)

    x = qkv(2, 4, 128, 128, 64, torch.bfloat16)
    x.append(torch.randn(1, 4, 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True))
    fused = run(compile_always(fn, Recorder("eager")), x)
    assert len(fusion_pass.last_report().fused) == 1
    assert_rule(fused, run(fn, x), exactly(fn, x))


@pytest.mark.parametrize("diagonal", [0, -1])
def test_a_bool_mask_is_a_choice(diagonal: int) -> None:
    """Not the numbers that torch makes of it for its kernel."""
    seen = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril(diagonal)
    recorder, x = Recorder("eager"), qkv(2, 4, 256, 256, 64, torch.bfloat16)
    compile_always(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, seen), recorder)(*x)
    (site,) = fusion_pass.last_report().fused
    assert site.attention is not None and site.attention.formula.endswith(", -inf))"), site.attention.formula


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_replaced_where_it_has_a_mask(masked: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask if masked else None)

    x = [*qkv(4, 8, 512, 512, 64, torch.bfloat16), hidden(4, 1, 512, 512)]
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=fusion_pass.make_backend(inner=Recorder("inductor")), fullgraph=True)
    result = run(compiled, x)
    (site,) = fusion_pass.last_report().sites
    assert site.verdict.fused == masked
    assert masked or site.verdict.reason is Reason.NOT_PROFITABLE
    assert_rule(result, run(fn, x), exactly(fn, x))


def test_under_autocast() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v, mask)

    x = [*qkv(2, 4, 63, 129, 64, torch.float32), hidden(2, 1, 63, 129)]
    fused = run(compile_always(fn, Recorder("eager")), x)
    (site,) = fusion_pass.last_report().fused
    assert site.attention is not None and site.attention.q.dtype == torch.bfloat16
    assert_rule(fused, run(fn, x), exactly(fn, x))
