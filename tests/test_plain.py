"""Plain and causal sites where cuDNN serves: torch's own attention takes their place, and nobody else's.

Here the choice is made for a CPU as it would be for a Hopper GPU; torch's attention then runs on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run
from dropped import Dropping
from fusion_kernels import cudnn
from fusion_kernels.program import Program
from torch import Tensor

import fusion_pass
from fusion_pass import pipeline, plain


@pytest.fixture(autouse=True)
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_for(_: object, dtype: torch.dtype, v_dtype: torch.dtype, program: Program, dropout_p: float, **how: bool) -> str:
        fits = dtype == v_dtype and dtype in cudnn.HALVES and not dropout_p and cudnn.expresses(program)
        return "cudnn" if fits else "tiled"

    monkeypatch.setattr(pipeline, "kernel_for", kernel_for)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return scores(q, k).masked_fill(~mask, -math.inf).softmax(-1) @ v


def causal_by_finfo(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])
    return torch.where(j <= i, scores(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k[:, :2], v[:, :2]))
    return causal(q, k, v)


def other_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def split_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    return causal(q, k, v).transpose(1, 2).flatten(2)


def tensors(n: int = 129, m: int = 129, d: int = 16, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, rows, d, generator=generator).to(dtype).requires_grad_() for rows in (n, m, m)]


def kernels(recorder: Recorder) -> list[str]:
    """Which attention the graphs call."""
    nodes = [n.target for gm in recorder.graphs for n in gm.graph.nodes if n.op == "call_function"]
    names = {F.scaled_dot_product_attention: "sdpa"}
    return [names.get(t, "op") for t in nodes if t in names or getattr(t, "namespace", None) == "fusion_kernels"]


def compiled(fn: Callable[..., Tensor], inputs: list[Tensor], inner: str = "eager", dynamic: bool = False) -> list[str]:
    """Fuse, hold the result to the rule, and say which attention was called."""
    recorder = Recorder(inner)
    fused = run(compile_always(fn, recorder, dynamic=dynamic), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(fn, inputs), exactly(fn, inputs))
    return kernels(recorder)


@pytest.mark.parametrize("dtype", cudnn.HALVES, ids=str)
@pytest.mark.parametrize("fn", [full, causal, grouped, other_scale, split_heads])
def test_torchs_own(fn: Callable[..., Tensor], dtype: torch.dtype) -> None:
    assert compiled(fn, tensors(dtype=dtype)) == ["sdpa"]


def test_a_mask_that_is_as_good_as_none() -> None:
    assert compiled(causal_by_finfo, tensors()) == ["sdpa"]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_under_a_compiler(inner: str) -> None:
    assert compiled(causal, tensors(), inner) == ["sdpa"]


def anticausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu()
    return scores(q, k).masked_fill(~mask, -math.inf).softmax(-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(scores(q, k) / 5) * 5).softmax(-1) @ v


OTHERS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "another mask": (anticausal, tensors()),
    "more than a scale": (softcap, tensors()),
    "causal, of two lengths": (causal, tensors(n=64)),
    "few keys": (full, tensors(m=63)),
    "half a tile of keys": (full, tensors(m=192)),
    "a single query": (full, tensors(n=1)),
    "a head dim that is no multiple of 8": (full, tensors(d=20)),
    "a mask that float16 can see through": (causal_by_finfo, tensors(dtype=torch.float16)),
    "fp32": (full, tensors(dtype=torch.float32)),
}


def named() -> tuple[str, str]:
    """The kernels that the report names: of the forward, and of the backward."""
    (site,) = fusion_pass.last_report().fused
    return site.verdict.kernel, site.verdict.backward


@pytest.mark.parametrize("name", OTHERS)
def test_the_op(name: str) -> None:
    fn, inputs = OTHERS[name]
    assert compiled(fn, inputs) == ["op"]
    assert "cudnn" not in named()


def test_unknown_lengths_are_left_to_the_op() -> None:
    assert compiled(causal, tensors(), dynamic=True) == ["op"]
    assert compiled(other_scale, tensors(), dynamic=True) == ["op"]
    assert named() == ("cudnn or triton", "cudnn or triton")


@pytest.mark.parametrize(("checks", "called"), [(True, "sdpa"), (False, "op")])
def test_an_unknown_batch(monkeypatch: pytest.MonkeyPatch, checks: bool, called: str) -> None:
    """cuDNN takes up to 65535 of it; where torch does not look, the op does."""
    monkeypatch.setattr(plain, "CHECKS_BATCH", checks)
    recorder, inputs = Recorder(), tensors()
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    compile_always(causal, recorder)(*inputs)
    assert kernels(recorder) == [called]


@pytest.mark.parametrize("p", [0.1, 0.125])
def test_dropout_is_for_the_op(p: float) -> None:
    """cuDNN has it, but its masks are not what eager draws."""
    recorder = Recorder("aot_eager")
    compile_always(Dropping(p, causal=True), recorder)(*tensors())
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert kernels(recorder) == ["op"] and named() == ("tiled", "tiled")
