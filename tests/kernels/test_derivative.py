"""Every rule of the derivative table against torch's autograd, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_kernels.derivative import RULES, vjp
from fusion_kernels.evaluate import Box, Environment, evaluate, scatter
from fusion_kernels.program import GRAD, OPS, SCORE, Capture, Node, Program, apply, const, index, load, postorder
from hypothesis import given, settings
from hypothesis import strategies as st

B, H, N, M = 2, 3, 5, 7
SHAPE = (B, H, N, M)
AXES = {"b": B, "h": H, "q": N, "k": M}


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


def environment(score: torch.Tensor, captures: list[torch.Tensor], grad: torch.Tensor | None = None) -> Environment:
    sizes = dict(zip("BHNM", SHAPE, strict=True))
    return Environment(Box((0, B), (0, H), (0, N), (0, M)), sizes, captures, [], torch.float64, score.device, score, grad)


def compare(program: Program, score: torch.Tensor, captures: list[torch.Tensor]) -> None:
    """The table's gradient of `program` at `score` and at every capture, against autograd of its evaluation."""
    floats = tuple(i for i, c in enumerate(captures) if c.is_floating_point())
    leaves = [score, *(captures[i] for i in floats)]
    for t in leaves:
        t.requires_grad_()
    (value,) = evaluate([program.root], environment(score, captures))
    value = torch.as_tensor(value, dtype=torch.float64).expand(SHAPE)
    grad = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    wanted = torch.autograd.grad(value, leaves, grad, allow_unused=True) if value.requires_grad else [None] * len(leaves)
    wanted = [torch.zeros_like(t) if w is None else w for t, w in zip(leaves, wanted, strict=True)]

    with torch.no_grad():
        result = vjp(program, floats)
        env = environment(score, captures, grad)
        ds, *dloads = evaluate([result.dscore, *(g for _, g in result.loads)], env)
        sums = [torch.zeros_like(c, dtype=torch.float64) for c in captures]
        for (node, _), g in zip(result.loads, dloads, strict=True):
            scatter(node, torch.as_tensor(g, dtype=torch.float64), sums[node.attr], env)  # type: ignore[index]
    found = [torch.as_tensor(ds, dtype=torch.float64).expand(SHAPE), *(sums[i] for i in floats)]
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-12, equal_nan=True)


def samples(op_name: str) -> torch.Tensor:
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x.abs() + 0.1 if op_name in ("log", "sqrt", "rsqrt", "pow", "log1p") else x


PAIR = load(0, "float", [index("h"), index("q"), index("k")])


@pytest.mark.parametrize(
    "name", sorted(n for n, (arity, _) in OPS.items() if n in RULES and arity == 1 and not n.startswith("round"))
)
def test_every_rule_of_one_argument(name: str) -> None:
    compare(Program(op(name, SCORE)), samples(name), [])
    compare(Program(op("mul", op(name, op("mul", SCORE, 1.5)), SCORE)), samples(name), [])


@pytest.mark.parametrize("name", sorted(n for n, (arity, _) in OPS.items() if n in RULES and arity == 2))
def test_every_rule_of_two_arguments(name: str) -> None:
    other = torch.randn(H, N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    captures = (Capture("float", 3),)
    compare(Program(op(name, SCORE, PAIR), captures), samples(name), [other.clone()])
    compare(Program(op(name, PAIR, SCORE), captures), samples(name), [other.abs() + 0.2])
    compare(Program(op(name, SCORE, 1.25)), samples(name), [])
    compare(Program(op(name, 1.25, SCORE)), samples(name), [])


def test_every_differentiable_operation_has_a_rule() -> None:
    without = {n for n, (_, kind) in OPS.items() if n not in RULES}
    to_other_kinds = {n for n, (_, kind) in OPS.items() if kind in ("bool", "int")}
    assert without == to_other_kinds | {"to_float"}


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_ties_and_nan_are_shared_as_torch_does(name: str) -> None:
    score = torch.tensor([0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 0.5], dtype=torch.float64).expand(SHAPE).clone()
    other = torch.tensor([0.0, 1.0, 2.0, 1.0, math.inf, 0.0, math.nan], dtype=torch.float64)
    compare(Program(op(name, SCORE, load(0, "float", [index("k")])), (Capture("float", 1),)), score, [other])


def test_the_corners_of_abs_and_pow() -> None:
    score = torch.tensor([0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -2.0], dtype=torch.float64).expand(SHAPE).clone()
    compare(Program(op("abs", SCORE)), score.clone(), [])
    for exponent in (0.0, 1.0, 2.0, 3.0):
        compare(Program(op("pow", SCORE, exponent)), score.clone(), [])


def test_an_untaken_branch_does_not_leak() -> None:
    p = op("gt", SCORE, 0.0)
    compare(Program(op("where", p, op("log", SCORE), op("sqrt", op("neg", SCORE)))), samples("where"), [])
    masked = op("where", op("le", index("k"), index("q")), op("mul", SCORE, 2.0), -math.inf)
    ds = vjp(Program(masked)).dscore
    (value,) = evaluate([ds], environment(torch.ones(SHAPE), [], torch.full(SHAPE, math.nan)))
    assert bool((value[..., 0, 1:] == 0).all()), "a NaN row must not reach the masked scores"


@pytest.mark.parametrize("name", ["round_float16", "round_bfloat16"])
def test_a_cast_passes_the_gradient_unrounded(name: str) -> None:
    assert vjp(Program(op(name, SCORE))).dscore is GRAD


def test_gradients_of_captures_of_every_rank() -> None:
    b, h, q, k = (index(n) for n in "bhqk")
    plans: list[list[Node]] = [
        [], [h], [k], [q, k], [k, q], [h, q, k], [b, h, q, k], [b, const(0), const(0), k], [k, b],
        [op("sub", k, op("sub", q, N - 1))], [h, op("add", op("mul", q, M), k)], [op("floordiv", h, 2), q], [op("mod", k, 3)],
    ]  # fmt: skip
    others = {"const": 1, "floordiv": 2, "mod": 3, "sub": N + M - 1, "add": N * M}
    generator = torch.Generator().manual_seed(5)
    for plan in plans:
        shape = [AXES[n.attr] if n.op == "index" else others[n.op] for n in plan]  # type: ignore[index]
        capture = torch.randn(shape, dtype=torch.float64, generator=generator)
        for combine in ("add", "mul"):
            root = op("tanh", op(combine, SCORE, load(0, "float", plan)))
            compare(Program(root, (Capture("float", len(plan)),)), samples("tanh"), [capture.clone()])


def test_a_capture_read_twice_gets_both() -> None:
    twice = op("mul", op("add", SCORE, load(0, "float", [index("q")])), load(0, "float", [index("k")]))
    compare(Program(twice, (Capture("float", 1),)), samples("mul"), [torch.randn(M, dtype=torch.float64)])


def test_shared_subexpressions_are_shared() -> None:
    capped = op("tanh", op("mul", SCORE, 0.1))
    gradient = vjp(Program(op("mul", capped, 10.0)))
    assert capped in set(postorder(gradient.dscore))
    assert vjp(Program(SCORE)).dscore is GRAD
    assert vjp(Program(load(0, "float", [index("k")]), (Capture("float", 1),))).dscore is const(0.0)


def test_a_gradient_is_only_asked_of_float_captures() -> None:
    program = Program(op("where", load(0, "bool", [index("k")]), SCORE, 0.0), (Capture("bool", 1),))
    for wrt in ((0,), (1,), (-1,)):
        with pytest.raises(ValueError, match=rf"capture {wrt[0]} cannot have a gradient; float captures are \[\]"):
            vjp(program, wrt)


UNARY = ["neg", "abs", "exp", "tanh", "sigmoid", "sin", "cos", "erf", "expm1"]


@st.composite
def expressions(draw: st.DrawFn) -> Node:
    pool: list[Node] = [op("mul", SCORE, 0.3), PAIR, load(1, "float", [index("k")]), const(0.7), op("to_float", index("q"))]
    for _ in range(draw(st.integers(1, 6))):
        a, b = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            pool.append(op("tanh", op(draw(st.sampled_from(UNARY)), a)))
        elif kind == 1:
            pool.append(op(draw(st.sampled_from(["add", "sub", "mul", "maximum", "minimum"])), a, b))
        elif kind == 2:
            pool.append(op("where", op("lt", a, b), b, op("sin", a)))
        else:
            pool.append(op("div", a, op("add", op("mul", b, b), 1.0)))
    return pool[-1]


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_composed_programs(root: Node) -> None:
    generator = torch.Generator().manual_seed(6)
    pair, keys = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((H, N, M), (M,)))
    compare(Program(root, (Capture("float", 3), Capture("float", 1))), samples("tanh"), [pair, keys])
