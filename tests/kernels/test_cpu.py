"""ATen's CPU attention is used where it is exact, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from fusion_kernels import cpu, reference
from fusion_kernels.choice import force
from fusion_kernels.op import ATTENTION
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load
from fusion_kernels.sdpa import Form, form

B_, H_, Q, K = (index(n) for n in "bhqk")
ZERO = const(0)
LOWEST = torch.finfo(torch.float32).min


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


SCALED = op("mul", SCORE, 0.25)
CAUSAL = op("le", K, Q)
KEEP = load(0, "bool", [B_, ZERO, ZERO, K])
ADDED = load(0, "float", [B_, ZERO, Q, K])
BOOL, FLOAT = (Capture("bool", 4),), (Capture("float", 4),)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
        original = getattr(torch.ops.aten, name)

        def spy(*args: object, _name: str = name, _original: object = original, **kwargs: object) -> object:
            names.append(_name)
            return _original(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(cpu.aten, name, spy)
    yield names


def tensors(n: int, m: int, kv_heads: int = 4, d: int = 16, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n + m)
    shapes = ((2, 4, n, d), (2, kv_heads, m, d), (2, kv_heads, m, d))
    return [torch.randn(s, dtype=torch.float64, generator=g).to(dtype).requires_grad_() for s in shapes]


def run(program: Program, inputs: list[torch.Tensor], captures: list[torch.Tensor]) -> list[torch.Tensor]:
    out, lse = ATTENTION(*inputs, captures, [], program.text, 0.0, None)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, do), lse]


FORMS = {
    "score": (Program(SCORE), Form(1.0, False, None)),
    "scaled": (Program(op("div", op("mul", 2.0, SCORE), 8.0)), Form(0.25, False, None)),
    "causal": (Program(op("where", CAUSAL, SCALED, -math.inf)), Form(0.25, True, None)),
    "causal, the other way": (Program(op("where", op("gt", K, Q), LOWEST, SCALED)), Form(0.25, True, None)),
    "causal, negated": (Program(op("where", op("not", op("lt", Q, K)), SCALED, -1e9)), Form(0.25, True, None)),
    "mask": (Program(op("where", KEEP, SCALED, -1e9), BOOL), Form(0.25, False, op("where", KEEP, 0.0, -math.inf))),
    "added": (Program(op("add", ADDED, SCALED), FLOAT), Form(0.25, False, ADDED)),
    "added after": (Program(op("add", op("where", CAUSAL, SCALED, -math.inf), ADDED), FLOAT), Form(0.25, True, ADDED)),
    "added before": (Program(op("where", CAUSAL, op("add", SCALED, ADDED), -math.inf), FLOAT), Form(0.25, True, ADDED)),
    "both": (
        Program(op("where", op("and", CAUSAL, KEEP), SCALED, -math.inf), BOOL),
        Form(0.25, True, op("where", KEEP, 0.0, -math.inf)),
    ),
}
OTHERS = {
    "softcap": Program(op("tanh", SCALED)),
    "a mask that counts": Program(op("where", KEEP, SCALED, -1e4), BOOL),
    "a finite mask lifted again": Program(op("add", op("where", KEEP, SCALED, -1e9), 1e9), BOOL),
    "multiplied": Program(op("mul", SCALED, ADDED), FLOAT),
    "masked by the score": Program(op("where", op("gt", SCORE, 0.0), SCALED, -math.inf)),
    "rounded": Program(op("round_bfloat16", SCALED)),
    "no score": Program(ADDED, FLOAT),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_aten_computes(name: str) -> None:
    program, expected = FORMS[name]
    assert form(program) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_what_aten_does_not_compute(name: str) -> None:
    assert form(OTHERS[name]) is None


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 129), (197, 197)])
def test_aten_is_the_reference(name: str, n: int, m: int, called: list[str]) -> None:
    program, _ = FORMS[name]
    g = torch.Generator().manual_seed(1)
    captures = [
        (torch.rand(2, 1, 1, m, generator=g) < 0.7).index_fill_(3, torch.tensor([0]), True)
        if c.kind == "bool"
        else torch.randn(2, 1, n, m, dtype=torch.float64, generator=g)
        for c in program.captures
    ]
    for kv_heads in (4, 2):
        inputs = tensors(n, m, kv_heads)
        found = run(program, inputs, captures)
        assert len(called) == 1
        called.clear()
        with force("dense"):
            expected = run(program, inputs, captures)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fill", [-math.inf, LOWEST, -1e9])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_without_a_key_are_left_to_the_reference(fill: float, causal: bool, additive: bool, called: list[str]) -> None:
    keep = torch.arange(63).expand(2, 63) >= torch.tensor([[20 if causal else 63], [0]])
    keep = keep[:, None, None, :]
    if additive:
        captures = [torch.zeros(2, 1, 1, 63, dtype=torch.float64).masked_fill(~keep, fill)]
        masked = Program(op("add", SCALED, load(0, "float", [B_, ZERO, ZERO, K])), FLOAT)
    else:
        captures, masked = [keep], Program(op("where", KEEP, SCALED, fill), BOOL)
    program = masked.with_root(op("where", CAUSAL, masked.root, fill)) if causal else masked
    inputs = tensors(63, 63)
    found = run(program, inputs, captures)
    assert not called
    with force("dense"):
        expected = run(program, inputs, captures)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_what_else_is_left_to_the_reference(called: list[str]) -> None:
    q, k, v = tensors(9, 9)
    with torch.no_grad():
        ATTENTION(q, k, v[..., :8], [], [], Program(SCALED).text, 0.0, None)  # another head dim
        ATTENTION(q, k, v.float(), [], [], Program(SCALED).text, 0.0, None)  # another dtype
        ATTENTION(q, k, v, [], [], Program(SCALED).text, 0.1, torch.tensor(1))  # dropout
        ATTENTION(q.mT.contiguous().mT, k, v, [], [], Program(SCALED).text, 0.0, None)  # strides
        ATTENTION(q[:, :, :0], k, v, [], [], Program(SCALED).text, 0.0, None)  # nothing
    assert not called


def test_a_mask_with_a_gradient_gets_it(called: list[str]) -> None:
    bias = torch.randn(2, 1, 9, 9, dtype=torch.float64, requires_grad=True)
    inputs = tensors(9, 9)
    program = FORMS["added"][0]
    out, _ = ATTENTION(*inputs, [bias], [], program.text, 0.0, None)
    (found,) = torch.autograd.grad(out.square().sum(), [bias])
    (expected,) = torch.autograd.grad(reference.dense(*inputs, [bias], [], program)[0].square().sum(), [bias])  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["scaled", "causal", "mask", "added"])
def test_as_close_to_float64_as_eager(name: str, dtype: torch.dtype, called: list[str]) -> None:
    program, form = FORMS[name]
    inputs = tensors(63, 129, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    keep = (torch.arange(129) % 3 != 1).expand(2, 1, 1, 129)
    added = torch.randn(2, 1, 63, 129, generator=torch.Generator().manual_seed(2)).to(dtype)
    captures = {"mask": [keep], "added": [added]}.get(name, [])

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        x = (q @ k.mT) * form.scale
        if name == "mask":
            x = x.masked_fill(~keep, -1e9 if dtype != torch.float16 or q.dtype == torch.float64 else -6e4)
        elif name == "added":
            x = x + added.to(q.dtype)
        elif name == "causal":
            x = x.masked_fill(torch.ones(63, 129, dtype=torch.bool).triu(1), -math.inf)
        out = torch.softmax(x, -1) @ v
        do = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, [q, k, v], do)]

    exact, theirs, ours = eager(*wide), eager(*inputs), run(program, inputs, captures)[:-1]
    assert len(called) == 1
    for x, e, f in zip(exact, theirs, ours, strict=True):
        ours_error, eager_error = ((t.double() - x).abs().max().item() for t in (f, e))
        assert ours_error <= 2 * eager_error + torch.finfo(dtype).eps * x.abs().max().item()


def test_odd_mask_strides(called: list[str]) -> None:
    inputs = tensors(63, 63)
    base = torch.randn(2, 1, 63, 63, dtype=torch.float64)
    program = FORMS["added"][0]
    expected = run(program, inputs, [base])
    for mask in (base.mT.contiguous().mT, torch.stack([base, base], -1)[..., 0]):
        for f, e in zip(run(program, inputs, [mask]), expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)
    broadcast = base[:1, :, :1].expand(2, 1, 63, 63)
    with force("dense"):
        expected = run(program, inputs, [broadcast])
    for f, e in zip(run(program, inputs, [broadcast]), expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["scaled", "causal", "mask", "both", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_reach_what_they_reach_in_eager(name: str, dtype: torch.dtype) -> None:
    program, _ = FORMS[name]
    captures = [
        (torch.arange(63) % 3 != 1).expand(2, 1, 1, 63) if c.kind == "bool" else torch.randn(2, 1, 63, 63)
        for c in program.captures
    ]
    for where in range(3):
        for value in (math.nan, math.inf, -math.inf):
            inputs = [t.detach() for t in tensors(63, 63, dtype=dtype)]
            inputs[where][0, 1, 31, 3] = value
            inputs = [t.requires_grad_() for t in inputs]
            found = run(program, inputs, captures)[:-1]
            with force("dense"):
                expected = run(program, inputs, captures)[:-1]
            for f, e in zip(found, expected, strict=True):
                assert torch.equal(f.isnan(), e.isnan()), (where, value)


@pytest.mark.parametrize("name", ["scaled", "causal", "added"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 3e38])
def test_scores_without_a_bound_are_left_to_the_reference(name: str, value: float, called: list[str]) -> None:
    """Some rows of them are 0 there, and NaN in eager; and what a mask hides by -1e9 may be larger than what it leaves."""
    for where in range(3 if name == "added" else 2):
        inputs = [t.detach() for t in tensors(63, 63, dtype=torch.bfloat16)]
        captures = [torch.randn(2, 1, 63, 63)] if name == "added" else []
        [*inputs[:2], *captures][where][0, 0, 31, 3] = value if where < 2 else abs(value)
        with torch.no_grad():
            ATTENTION(*inputs, captures, [], FORMS[name][0].text, 0.0, None)
        assert not called, where
