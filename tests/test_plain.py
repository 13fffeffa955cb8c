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
from dropped import Dropping, P, assert_dropout
from fusion_kernels import cudnn
from fusion_kernels.program import Program
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.utils.checkpoint import checkpoint

import fusion_pass
from fusion_pass import pipeline, plain
from fusion_pass.site import Reason


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


def calls(recorder: Recorder) -> list[torch.fx.Node]:
    """Where the graphs, checkpointed regions included, call attention."""
    inner = [gm for graph in recorder.graphs for gm in graph.modules() if isinstance(gm, torch.fx.GraphModule)]
    nodes = [n for gm in inner for n in gm.graph.nodes if n.op == "call_function"]
    own = F.scaled_dot_product_attention
    return [n for n in nodes if n.target is own or getattr(n.target, "namespace", None) == "fusion_kernels"]


def kernels(recorder: Recorder) -> list[str]:
    """Which attention the graphs call."""
    return ["sdpa" if n.target is F.scaled_dot_product_attention else "op" for n in calls(recorder)]


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


# ---------------------------------------------------------------- with dropout


def by_bernoulli(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = scores(q, k).softmax(-1)
    return (p * torch.empty_like(p).bernoulli_(1 - P).div_(1 - P)) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(scores(q, k).softmax(-1).clone(), P, inplace=True) @ v


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return checkpoint(Dropping(), q, k, v, use_reentrant=False)  # pyright: ignore[reportReturnType]


def few_heads(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [q, *(t.detach()[:, :2].clone().requires_grad_() for t in (k, v))]


DROPPED: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
    "full": (Dropping(), tensors(), "eager"),
    "causal": (Dropping(causal=True), tensors(), "eager"),
    "float16": (Dropping(causal=True), tensors(dtype=torch.float16), "eager"),
    "grouped": (Dropping(causal=True), few_heads(*tensors()), "eager"),
    "two lengths": (Dropping(), tensors(n=63, m=197), "eager"),
    "by bernoulli": (by_bernoulli, tensors(), "eager"),
    "in place": (in_place, tensors(), "eager"),
    "aot_eager": (Dropping(), tensors(), "aot_eager"),
    "inductor": (Dropping(causal=True), tensors(), "inductor"),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropout_in_training(name: str) -> None:
    fn, inputs, inner = DROPPED[name]
    recorder = Recorder(inner)
    call = compile_always(fn, recorder)
    assert_dropout(call, inputs, P, isinstance(fn, Dropping) and fn.causal)
    report = fusion_pass.last_report()
    assert_fused(report, recorder, 1)
    (node,) = calls(recorder)
    assert node.target is F.scaled_dot_product_attention
    assert node.kwargs["dropout_p"] == pytest.approx(P, abs=1e-15) and type(node.kwargs["dropout_p"]) is float
    assert named() == ("cudnn", "cudnn")
    assert "  dropout  p = 0.125, in the kernel\n  kernel   cudnn\n" in f"{report}\n"


def test_a_checkpoint_around_it() -> None:
    """What is run again, outside of the compiled graph, draws the same mask: torch puts its generator back."""
    recorder = Recorder("aot_eager")
    call = compile_always(Dropping(), recorder)
    assert_dropout(lambda *a: checkpoint(call, *a, use_reentrant=False), tensors(), P, causal=False)  # pyright: ignore
    assert kernels(recorder) == ["sdpa"]


@pytest.mark.parametrize("p", [0.5, 0.9375])
def test_other_rates(p: float) -> None:
    recorder = Recorder()
    assert_dropout(compile_always(Dropping(p), recorder), tensors(), p, causal=False)
    assert kernels(recorder) == ["sdpa"]


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout(torch.tanh(scores(q, k)).softmax(-1), P) @ v


def no_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((scores(q, k) * 0.0).softmax(-1), P) @ v


def without_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return Dropping()(q, k, v)


NOT_DROPPED: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "a rate between the steps": (Dropping(0.1), tensors()),
    "a rate below the first step": (Dropping(0.01), tensors()),
    "everything": (Dropping(1.0), tensors()),
    "nothing that needs a gradient": (Dropping(), [t.detach() for t in tensors()]),
    "no grad mode": (without_grad, tensors()),
    "one query": (Dropping(), tensors(n=1)),
    "fp32": (Dropping(), tensors(dtype=torch.float32)),
    "more than a scale": (softcapped, tensors()),
    "a checkpointed region": (checkpointed, tensors()),
    "no scores": (no_scores, tensors()),
}


@pytest.mark.parametrize("name", NOT_DROPPED)
def test_dropout_of_the_op(name: str) -> None:
    fn, inputs = NOT_DROPPED[name]
    recorder = Recorder("aot_eager")
    compile_always(fn, recorder)(*inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert kernels(recorder) == ["op"]
    assert named()[0] == "tiled" and "cudnn" not in named()


def test_dropout_of_unknown_lengths_is_left_to_the_op() -> None:
    recorder = Recorder()
    compile_always(Dropping(), recorder, dynamic=True)(*tensors())
    assert kernels(recorder) == ["op"] and named() == ("tiled", "tiled")


@pytest.mark.parametrize("setting", [{"aggressive_recomputation": True}, {"activation_memory_budget": 0.5}], ids=str)
def test_where_torch_may_draw_again_in_the_backward(setting: dict[str, object]) -> None:
    recorder = Recorder()
    with torch._functorch.config.patch(setting):  # pyright: ignore[reportAttributeAccessIssue]
        compile_always(Dropping(), recorder)(*tensors())
    assert kernels(recorder) == ["op"]


def test_one_bit_for_several_probabilities_is_refused() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = scores(q, k).softmax(-1)
        return (p * F.dropout(torch.ones_like(p[:, :1]), P)) @ v

    recorder = Recorder()
    compile_always(shared, recorder)(*tensors())
    (site,) = fusion_pass.last_report().refused
    assert site.verdict.reason is Reason.DROPOUT and not calls(recorder)


def test_the_module_s_mode() -> None:
    """eval() leaves no dropout; training without gradients is for the op."""
    module, recorder = Dropping(), Recorder()
    call, inputs = compile_always(module, recorder), tensors()
    call(*inputs)
    module.eval()
    assert_rule(run(call, inputs), run(module, inputs), exactly(module, inputs))
    module.train()
    with torch.no_grad():
        call(*inputs)
    assert kernels(recorder) == ["sdpa", "sdpa", "op"]
    assert ["dropout_p" in n.kwargs for n in calls(recorder)] == [True, False, False]


def scales(recorder: Recorder) -> list[float]:
    return [float(n.kwargs["scale"]) for n in calls(recorder)]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_two_sites_draw_apart(inner: str) -> None:
    """torch merges equal calls, and does not know that this one is random: no two are equal, by less than fp32 can see."""
    recorder, one = Recorder(inner), Dropping()
    both = compile_always(lambda *a: (one(*a), one(*a)), recorder)
    first, second = both(*tensors())
    assert kernels(recorder) == ["sdpa", "sdpa"] and not torch.equal(first, second)
    a, b = scales(recorder)
    assert a != b and torch.tensor(a) == torch.tensor(b) == torch.tensor(0.25)
    assert merged([a, a]) == 1 and merged([a, b]) == 2


def merged(scales: list[float]) -> int:
    """How many calls of cuDNN's attention are left of one for each scale."""
    graph = torch.fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    op = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    graph.output([graph.call_function(op, (q, k, v, None, True, P), {"scale": s}) for s in scales])
    return sum(n.target is op for n in fx_graph_cse(graph).nodes)


def test_without_dropout_a_scale_is_as_given() -> None:
    recorder = Recorder()
    compile_always(lambda *a: (full(*a), full(*a)), recorder)(*tensors())
    assert scales(recorder) == [0.25, 0.25]
