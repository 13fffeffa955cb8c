"""The custom ops and `fusion_kernels.attention`: promises to autograd, fake tensors and compilers; and bad input."""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import sys
from typing import Any

import fusion_kernels
import pytest
import torch
import torch.nn.functional as F
from fusion_kernels import op as ops
from fusion_kernels import reference
from fusion_kernels.choice import force, kernel_for
from fusion_kernels.op import ATTENTION, ATTENTION_BACKWARD
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, param
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

B_, H_, Q, K = (index(n) for n in "bhqk")


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


SCALED = op("mul", SCORE, 0.25)
CAUSAL = Program(op("where", op("le", K, Q), SCALED, -math.inf))
BIASED = Program(op("add", SCALED, load(0, "float", [H_, Q, K])), (Capture("float", 3),))
WINDOW = Program(op("where", op("gt", K, op("sub", Q, param(0))), SCALED, -math.inf), params=1)


def tensors(n: int = 9, m: int = 13, kv: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).requires_grad_() for s in ((2, 4, n, 8), (2, kv, m, 8), (2, kv, m, 8))]


CASES: dict[str, tuple[Program, list[torch.Tensor], list[int], float]] = {
    "aten": (CAUSAL, [], [], 0.0),
    "bias": (BIASED, [torch.randn(4, 9, 13, requires_grad=True)], [], 0.0),
    "params and dropout": (WINDOW, [], [4], 0.25),
}


# ---------------------------------------------------------------- the ops, as a compiler sees them


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    program, captures, params, p = CASES[name]
    seed = torch.tensor(7) if p else None
    arguments = (*tensors(), captures, params, program.text, p, seed)
    torch.library.opcheck(ATTENTION, arguments)
    with torch.no_grad():
        out, lse = ATTENTION(*arguments)
    flat = [t.detach() for t in tensors()]
    captures = [c.detach() for c in captures]
    backward = (torch.randn_like(out), *flat, captures, params, program.text, p, seed, out, lse, [True] * len(captures))
    torch.library.opcheck(ATTENTION_BACKWARD, backward)


LAYOUTS = {
    "BHND": lambda b, h, n, d: torch.randn(b, h, n, d),
    "BNHD": lambda b, h, n, d: torch.randn(b, n, h, d).transpose(1, 2),
    "NBHD": lambda b, h, n, d: torch.randn(n, b, h, d).permute(1, 2, 0, 3),
    "packed": lambda b, h, n, d: torch.randn(b, n, 3, h, d)[:, :, 1].transpose(1, 2),
    "expanded": lambda b, h, n, d: torch.randn(b, 1, n, d).expand(b, h, n, d),
    "transposed": lambda b, h, n, d: torch.randn(b, h, d, n).mT,
    "one batch": lambda b, h, n, d: torch.randn(1, 1, h, n, d)[0].expand(1, h, n, d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["aten", "tiled", "dense"])
def test_fake_strides_are_real_strides(layout: str, implementation: str) -> None:
    make = LAYOUTS[layout]
    batch = 1 if layout == "one batch" else 2
    q, k, v = make(batch, 4, 9, 16), make(batch, 4, 9, 16), make(batch, 4, 9, 16)
    bias = torch.randn(9, 4, 9).transpose(0, 1)
    for program, captures in ((CAUSAL, []), (BIASED, [bias])):
        if implementation == "aten" and (captures or layout == "transposed"):
            continue
        with force(implementation):
            arguments = (q, k, v, captures, [], program.text, 0.0, None)
            real = ATTENTION(*arguments)
            more = (real[0].clone(), q, k, v, captures, [], program.text, 0.0, None, *real, [True] * len(captures))
            *real_grads, real_captures = ATTENTION_BACKWARD(*more)
        with FakeTensorMode() as mode:

            def fake(x: Any) -> Any:
                if isinstance(x, torch.Tensor):
                    return mode.from_tensor(x)
                return [fake(y) for y in x] if isinstance(x, list) else x

            promised = ATTENTION(*map(fake, arguments))
            *promised_grads, promised_captures = ATTENTION_BACKWARD(*map(fake, more))
        pairs = [*zip(real, promised, strict=True), *zip(real_grads, promised_grads, strict=True)]
        for r, p in [*pairs, *zip(real_captures, promised_captures, strict=True)]:
            assert (r.shape, r.dtype) == (p.shape, p.dtype)
            assert [s for s, n in zip(r.stride(), r.shape, strict=True) if n > 1] == [
                s for s, n in zip(p.stride(), p.shape, strict=True) if n > 1
            ]
        assert real[0].stride(-1) == 1
        if layout == "BNHD":
            assert real[0].transpose(1, 2).is_contiguous(), "so that the transpose and reshape after it are free"
            assert real_grads[0].transpose(1, 2).is_contiguous()


def test_out_takes_the_dtype_of_v_and_lse_is_base_2() -> None:
    q, k, v = tensors()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        out, lse = ATTENTION(q, k, v.to(dtype), [], [], CAUSAL.text, 0.0, None)
        assert out.dtype == dtype and lse.dtype == torch.float32
        expected, expected_lse = reference.dense(q, k, v.to(dtype), [], [], CAUSAL)
        near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {}  # computed in fp32: q and k are
        torch.testing.assert_close(out, expected, **near)
        torch.testing.assert_close(lse, expected_lse)


def test_the_name_carries_the_sources(tmp_path: Any) -> None:
    assert re.fullmatch(r"fusion_kernels::attention_[0-9a-f]{8}", ATTENTION.name())
    assert ATTENTION_BACKWARD.name().endswith(ops.VERSION)


def test_importing_costs_neither_triton_nor_inductor() -> None:
    code = "import sys, fusion_kernels.op; print([m for m in ('triton', 'torch._inductor', 'torch._dynamo') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_second_derivative_is_refused() -> None:
    q, k, v = tensors()
    out, _ = ATTENTION(q, k, v, [], [], CAUSAL.text, 0.0, None)
    (dq,) = torch.autograd.grad(out.square().sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="fusion_kernels: attention was differentiated twice"):
        dq.sum().backward()


def test_a_derivative_in_forward_mode_is_refused() -> None:
    q, k, v = (t.detach() for t in tensors())
    message = "fusion_kernels: attention was differentiated in forward mode"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        ATTENTION(forward_ad.make_dual(q, torch.ones_like(q)), k, v, [], [], CAUSAL.text, 0.0, None)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_a_mode_sees_the_ops(grad: bool) -> None:
    """Calls that go straight to the implementation do so only where nobody between autograd and the device looks."""
    q, k, v = tensors()
    with torch.set_grad_enabled(grad), Seen() as seen:
        out, _ = ATTENTION(q, k, v, [], [], CAUSAL.text, 0.0, None)
        if grad:
            out.sum().backward()
    assert ATTENTION.name() in seen.names
    assert (ATTENTION_BACKWARD.name() in seen.names) == grad
    assert not any("attention" in name and "fusion_kernels" not in name for name in seen.names), "what is below the op"


def test_a_call_is_planned_for_what_it_looks_like() -> None:
    """No plan serves a call that differs in what decides about it: each result is the one of a fresh process."""
    q, k, v = (t.detach() for t in tensors(9, 9))
    transposed = k.mT.contiguous().mT  # other strides
    other = apply("mul", SCORE, const(0.5))
    for program in (CAUSAL, Program(other), CAUSAL):
        for keys in (k, transposed, k.double(), k):
            for way in ("aten", "tiled", "dense"):
                queries, values = (t.to(keys.dtype) for t in (q, v))
                with force(way):
                    found = ATTENTION(queries, keys, values, [], [], program.text, 0.0, None)
                expected = reference.dense(queries, keys, values, [], [], program)
                torch.testing.assert_close(list(found), list(expected))


def test_only_flagged_captures_have_gradients() -> None:
    q, k, v = (t.detach() for t in tensors())
    bias = torch.randn(4, 9, 13)
    out, lse = ATTENTION(q, k, v, [bias], [], BIASED.text, 0.0, None)
    for needs in ([False], [True]):
        *_, found = ATTENTION_BACKWARD(torch.ones_like(out), q, k, v, [bias], [], BIASED.text, 0.0, None, out, lse, needs)
        assert [g.shape for g in found] == [bias.shape] * sum(needs)


def test_gradients_flow_to_what_asks_for_them() -> None:
    q, k, v = tensors()
    for needed in ([q], [k], [v], [q, v]):
        leaves = [t.detach().requires_grad_(any(t is n for n in needed)) for t in (q, k, v)]
        out, lse = ATTENTION(*leaves, [], [], CAUSAL.text, 0.0, None)
        assert not lse.requires_grad
        out.sum().backward()
        assert [t.grad is not None for t in leaves] == [any(t is n for n in needed) for t in (q, k, v)]


@pytest.mark.parametrize("plan", [[], [H_], [Q, K], [H_, Q, K], [B_, H_, Q, K], [B_, const(0), const(0), K]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captures_of_every_rank_get_gradients(plan: list[Node], dtype: torch.dtype) -> None:
    sizes = {"b": 2, "h": 4, "q": 9, "k": 13, 0: 1}
    g = torch.Generator().manual_seed(3)
    capture = torch.randn([sizes[n.attr] for n in plan], generator=g).to(dtype).requires_grad_()  # type: ignore[index]
    still = torch.randn([sizes[n.attr] for n in plan], generator=g).to(dtype)  # type: ignore[index]
    root = op("add", op("mul", SCORE, load(0, "float", plan)), load(1, "float", plan))
    program = Program(root, (Capture("float", len(plan)),) * 2)
    q, k, v = tensors()
    out, _ = ATTENTION(q, k, v, [capture, still], [], program.text, 0.0, None)
    do = torch.randn(out.shape, generator=g)
    (found,) = torch.autograd.grad(out, [capture], do)
    (expected,) = torch.autograd.grad(reference.dense(q, k, v, [capture, still], [], program)[0], [capture], do)
    assert found.dtype == dtype and found.shape == capture.shape
    torch.testing.assert_close(found, expected)


def test_inputs_are_untouched_and_outputs_are_new() -> None:
    only_bias = Program(BIASED.root.args[1], BIASED.captures)
    for program, captures in ((CAUSAL, []), (BIASED, [torch.randn(4, 9, 13)]), (only_bias, [torch.randn(4, 9, 13)])):
        inputs = [t.detach() for t in tensors()]
        before = [t.clone() for t in (*inputs, *captures)]
        out, lse = ATTENTION(*inputs, captures, [], program.text, 0.0, None)
        ATTENTION_BACKWARD(torch.ones_like(out), *inputs, captures, [], program.text, 0.0, None, out, lse, [True] * len(captures))
        for t, b in zip((*inputs, *captures), before, strict=True):
            assert torch.equal(t, b)


@pytest.mark.parametrize("way", ["dense", "tiled", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_not_part_of_the_op(way: str | None, dtype: torch.dtype) -> None:
    """torch leaves autocast on inside of an op: its own products would be rounded to 16 bits."""

    def call() -> list[torch.Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors()]
        out, _ = ATTENTION(*inputs, [torch.ones(4, 9, 13)], [], BIASED.text, 0.0, None)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    with force(way) if way else contextlib.nullcontext():
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            found = call()
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


# ---------------------------------------------------------------- compilers


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    text = BIASED.text

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        heads = [t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v)]
        out, _ = ATTENTION(*heads, [bias], [], text, 0.0, None)
        return out.transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    for n in (9, 17, 33) if dynamic else (9,):
        inputs = [torch.randn(2, n, 32, requires_grad=True) for _ in range(3)] + [torch.randn(4, n, n, requires_grad=True)]
        found, expected = compiled(*inputs), model(*inputs)
        do = torch.randn_like(expected)
        torch.testing.assert_close(found, expected)
        for f, e in zip(torch.autograd.grad(found, inputs, do), torch.autograd.grad(expected, inputs, do), strict=True):
            torch.testing.assert_close(f, e)


def test_the_public_function_compiles_whole() -> None:
    torch._dynamo.reset()

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return fusion_kernels.attention(q, k, v, causal=True, window=5, mask=mask, softcap=20.0)  # type: ignore[return-value]

    q, k, v = tensors(9, 9, 4)
    mask = torch.rand(2, 1, 1, 9) < 0.8
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask), model(q, k, v, mask), equal_nan=True)


# ---------------------------------------------------------------- which implementation


def test_kernel_for_and_force() -> None:
    softcap = Program(op("tanh", SCALED))
    single = torch.float32
    assert kernel_for("cuda", single, single, CAUSAL) == "triton"
    assert kernel_for("cpu", single, single, CAUSAL) == "aten-cpu"
    assert kernel_for("cpu", single, single, CAUSAL, 0.1) == "tiled"
    assert kernel_for("cpu", single, torch.bfloat16, CAUSAL) == "tiled"
    assert kernel_for("cpu", single, single, softcap) == "tiled"
    assert kernel_for("cpu", single, single, CAUSAL, backward=True) == "tiled"
    assert kernel_for("cpu", single, single, CAUSAL, backward=True, capture_grads=True) == "tiled"
    assert kernel_for("cpu", torch.bfloat16, torch.bfloat16, CAUSAL) == "aten-cpu"
    assert kernel_for("cpu", torch.bfloat16, torch.bfloat16, CAUSAL, backward=True) == "tiled"
    assert kernel_for("cpu", single, single, CAUSAL, same_head_dim=False) == "tiled"
    with force("dense"):
        assert kernel_for("cpu", single, single, CAUSAL) == "dense"
        with force("aten"):
            assert kernel_for("cpu", single, single, CAUSAL) == "aten-cpu"
            assert kernel_for("cpu", single, single, CAUSAL, backward=True, capture_grads=True) == "tiled"
            assert kernel_for("cuda", single, single, CAUSAL, backward=True, capture_grads=True) == "triton"
    message = "fusion_kernels: no implementation 'flash'; there are triton, cudnn, aten, tiled, dense"
    with pytest.raises(ValueError, match=message), force("flash"):
        pass
    assert kernel_for("cpu", single, single, softcap) == "tiled"


def test_a_forced_kernel_without_gradients_of_captures_leaves_them_to_another() -> None:
    q, k, v = (t.detach() for t in tensors(9, 9))
    bias = torch.randn(4, 9, 9, requires_grad=True)
    gradients = []
    for way in ("aten", "dense"):
        with force(way):
            out = ATTENTION(q, k, v, [bias], [], BIASED.text, 0.0, None)[0]
            gradients.append(torch.autograd.grad(out.square().sum(), bias)[0])
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- the public function


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, change: Any) -> torch.Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return torch.softmax(change((q @ k.mT) * scale), -1) @ v


BIAS = torch.randn(4, 1, 13, generator=torch.Generator().manual_seed(5))
MASK = torch.rand(2, 1, 9, 13, generator=torch.Generator().manual_seed(6)) < 0.7
MASK[..., 0] = True
ROW, KEY = torch.arange(9)[:, None], torch.arange(13)
USES: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, lambda x: x),
    "scale": ({"scale": 0.5}, lambda x: x),
    "causal": ({"causal": True}, lambda x: x.masked_fill(KEY > ROW, -math.inf)),
    "window": ({"window": 3}, lambda x: x.masked_fill((KEY - ROW).abs() >= 3, -math.inf)),
    "causal window": ({"causal": True, "window": 3}, lambda x: x.masked_fill((KEY > ROW) | (KEY <= ROW - 3), -math.inf)),
    "bias": ({"bias": BIAS}, lambda x: x + BIAS),
    "bool mask": ({"mask": MASK}, lambda x: x.masked_fill(~MASK, -math.inf)),
    "float mask": ({"mask": BIAS[0]}, lambda x: x + BIAS[0]),
    "softcap": ({"softcap": 3.0, "bias": BIAS}, lambda x: 3 * torch.tanh(x / 3) + BIAS),
    "all": (
        {"softcap": 3.0, "bias": BIAS, "mask": MASK, "causal": True},
        lambda x: (3 * torch.tanh(x / 3) + BIAS).masked_fill(~MASK | (KEY > ROW), -math.inf),
    ),
}


@pytest.mark.parametrize("name", USES)
def test_the_public_function(name: str) -> None:
    arguments, change = USES[name]
    q, k, v = tensors()
    found = fusion_kernels.attention(q, k, v, **arguments)
    expected = eager(q, k, v, arguments.get("scale", 8**-0.5), change)
    torch.testing.assert_close(found, expected)
    do = torch.randn_like(expected)
    for f, e in zip(torch.autograd.grad(found, [q, k, v], do), torch.autograd.grad(expected, [q, k, v], do), strict=True):
        torch.testing.assert_close(f, e)


def test_like_sdpa() -> None:
    q, k, v = tensors(kv=4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(fusion_kernels.attention(q, k, v, causal=True), expected)


def test_return_lse_and_a_program_of_ones_own() -> None:
    q, k, v = tensors(kv=4)
    own = Program(op("sub", op("mul", SCORE, 8**-0.5), op("mul", 0.1, op("to_float", op("abs", op("sub", Q, K))))))
    out, lse = fusion_kernels.attention(q, k, v, program=own, return_lse=True)
    x = (q @ k.mT) * 8**-0.5 - 0.1 * (ROW - KEY).abs()
    torch.testing.assert_close(out, torch.softmax(x, -1) @ v)
    torch.testing.assert_close(lse, torch.logsumexp(x, -1) * math.log2(math.e))
    torch.testing.assert_close(fusion_kernels.attention(q, k, v, program=own.text), out)


def test_dropout_is_decided_by_the_seed() -> None:
    q, k, v = tensors()
    a, b, c = (fusion_kernels.attention(q, k, v, dropout_p=0.5, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)  # type: ignore[arg-type]
    torch.manual_seed(0)
    a = fusion_kernels.attention(q, k, v, dropout_p=0.5)
    b = fusion_kernels.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    c = fusion_kernels.attention(q, k, v, dropout_p=0.5)
    assert torch.equal(a, c) and not torch.equal(a, b)  # type: ignore[arg-type]


def bad(**changes: Any) -> dict[str, Any]:
    q, k, v = (t.detach() for t in tensors())
    return {"q": q, "k": k, "v": v, **changes}


R = torch.randn
BAD: list[tuple[dict[str, Any], str]] = [
    (bad(q=R(4, 9, 8)), r"q has shape \(4, 9, 8\); needed: 4 dims"),
    (bad(v=R(2, 13, 8)), r"v has shape \(2, 13, 8\); needed: 4 dims"),
    (bad(k=R(2, 2, 13, 6)), r"q has shape \(2, 4, 9, 8\), k \(2, 2, 13, 6\) .*needed: one head dim"),
    (bad(q=R(2, 4, 9, 264), k=R(2, 2, 13, 264)), r"q has shape \(2, 4, 9, 264\); needed: a head dim .* from 1 to 256"),
    (bad(v=R(2, 2, 13, 300)), r"v has shape \(2, 2, 13, 300\); needed: a head dim .* from 1 to 256"),
    (bad(q=R(3, 4, 9, 8)), r"q has shape \(3, 4, 9, 8\).*needed: one batch size"),
    (bad(v=R(2, 2, 12, 8)), r"v \(2, 2, 12, 8\); needed: one batch size, number of heads and length for k and v"),
    (bad(q=R(2, 3, 9, 8)), r"q has shape \(2, 3, 9, 8\).*multiple of the number of key heads"),
    (bad(q=torch.ones(2, 4, 9, 8, dtype=torch.int32)), r"q has dtype torch.int32 on cpu; needed: torch.float16 or"),
    (bad(k=R(2, 2, 13, 8).double()), r"q has dtype torch.float32 and k torch.float64; needed: one dtype"),
    (bad(k=R(2, 2, 13, 8, device="meta")), r"k is on meta and q on cpu; needed: one device"),
    (bad(bias=R(4, 9, 12)), r"bias has shape \(4, 9, 12\); needed: broadcastable to \(2, 4, 9, 13\)"),
    (bad(bias=torch.ones(9, 13, dtype=torch.bool)), r"bias has dtype torch.bool; needed: floating point"),
    (bad(mask=torch.ones(9, 13, dtype=torch.int64)), r"mask has dtype torch.int64; needed: bool"),
    (bad(window=0), r"window is 0; needed: at least 1"),
    (bad(softcap=-1.0), r"softcap is -1.0; needed: a positive number"),
    (bad(dropout_p=1.5), r"dropout_p is 1.5; needed: a probability from 0 to 1"),
    (bad(dropout_p=0.5, seed=torch.zeros(1, dtype=torch.int64)), r"seed has shape \(1,\).*needed: a 0-d int64 tensor on cpu"),
    (bad(program=CAUSAL, causal=True), r"program was passed with causal; needed: one or the other"),
    (bad(captures=[R(1)]), r"without a program"),
    (bad(program=BIASED), r"0 captures and 0 params were passed; needed: 1 captures and 0 params"),
    (bad(program=BIASED, captures=[R(9, 13)]), r"captures\[0\] is float of shape \(9, 13\); needed: float with 3 dims"),
    (bad(program="softmax"), r"a score program starts with 'captures'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"fusion_kernels: .*{message}"):
        fusion_kernels.attention(**arguments)
