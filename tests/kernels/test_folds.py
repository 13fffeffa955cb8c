"""Constants that a condition chooses: what is done to them is done to each, and no bit of any value changes."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_kernels.evaluate import Box, Environment, evaluate
from fusion_kernels.folds import FOLDS, exact
from fusion_kernels.program import OPS, SCORE, Capture, Node, Program, apply, const, index, load
from hypothesis import given, settings
from hypothesis import strategies as st

Q, K = index("q"), index("k")
CAUSAL = apply("le", K, Q)
LOWEST = torch.finfo(torch.float32).min
INF = math.inf


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


def value(root: Node, dtype: torch.dtype, n: int = 5) -> torch.Tensor:
    """Over n queries and keys; the bits of a float, so that the sign of 0 counts (one NaN is as good as another)."""
    env = Environment(Box((0, 1), (0, 1), (0, n), (0, n)), {"B": 1, "H": 1, "N": n, "M": n}, [], [], dtype, torch.device("cpu"))
    out = torch.as_tensor(evaluate([root], env)[0], dtype=dtype if root.kind == "float" else None)
    out = out.expand(1, 1, n, n)[0, 0].clone()
    return out.nan_to_num(nan=123.0, posinf=INF, neginf=-INF).view(torch.int8) if root.kind == "float" else out


# ---------------------------------------------------------------- exactness

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 1e-9, 1e9, -1e9, -1e4, 1e30, -1e38, 1e-45, 65504.0, 65520.0, LOWEST, 16777217.0]),
    st.sampled_from([INF, -INF, math.nan]),
    st.floats(width=32),
    st.floats(-3e38, 3e38),
)
ONE = [n for n in FOLDS if OPS[n][0] == 1 and n not in ("not", "to_float")]
TWO = ["add", "sub", "mul", "div", "maximum", "minimum", "lt", "le", "gt", "ge", "eq", "ne"]


@st.composite
def chains(draw: st.DrawFn) -> tuple[Node, Node]:
    """Operations on numbers that k <= q chooses: folded, and as written."""
    p = draw(st.sampled_from([CAUSAL, apply("not", CAUSAL), apply("gt", K, Q)]))

    def chosen() -> tuple[Node, Node]:
        if draw(st.booleans()):
            return apply("to_float", p), Node.make("to_float", p)
        a, b = const(draw(numbers)), const(draw(numbers))
        return apply("where", p, a, b), Node.make("where", p, a, b)

    folded, raw = chosen()
    for _ in range(draw(st.integers(1, 5))):
        if folded.op == "const":
            break  # both branches are one number, and numbers are computed in double precision
        if raw.kind != "float":
            name = "to_float"
            folded, raw = apply(name, folded), Node.make(name, raw)
            continue
        name = draw(st.sampled_from([*ONE, *TWO, *TWO]))
        if name == "to_int":
            continue  # of what no integer holds, torch makes anything
        if OPS[name][0] == 1:
            folded, raw = apply(name, folded), Node.make(name, raw)
            continue
        other, same = chosen() if draw(st.booleans()) else (const(x := draw(numbers)), const(x))
        if name in ("add", "sub") and any(x.op == "const" and x.attr == 0 for x in (folded, other)):
            continue  # x + 0 and x - 0 are x to `apply`, whatever the signs of zeros
        args, kept = ((folded, other), (raw, same)) if draw(st.booleans()) else ((other, folded), (same, raw))
        folded, raw = apply(name, *args), Node.make(name, *kept)
    return folded, raw


@pytest.mark.filterwarnings("ignore:value cannot be converted")
@settings(max_examples=500, deadline=None)
@given(chains())
def test_no_bit_changes_in_either_precision(pair: tuple[Node, Node]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(value(pair[0], dtype), value(pair[1], dtype)), pair


@pytest.mark.parametrize(
    ("name", "values", "result"),
    [
        ("mul", (0.0, INF), math.nan),
        ("mul", (0.0, -1e9), -0.0),
        ("mul", (1e30, 1e30), None),  # inf in fp32
        ("add", (INF, -INF), math.nan),
        ("div", (-1e9, 8.0), -125000000.0),
        ("div", (-INF, 3.0), -INF),
        ("div", (-1.0, 1e-9), -1 / 1e-9),
        ("log", (0.0,), -INF),
        ("log", (1.0,), 0.0),
        ("exp", (-INF,), 0.0),
        ("to_bool", (math.nan,), True),
        ("round_float16", (-1e9,), -INF),
        ("round_bfloat16", (-1e9,), -998244352.0),
        ("eq", (1e-45, 1.401298464324817e-45), None),  # one number in fp32, two in fp64
        ("isinf", (1e60,), None),
        ("div", (1.0, 0.0), None),
        ("log", (2.0,), None),  # libraries differ
        ("maximum", (0.0, -0.0), None),
        ("to_int", (INF,), None),
        ("add", (2**31 - 1, 1), None),
        ("tanh", (1.0,), None),
        ("sqrt", (64.0,), 8.0),
        ("sqrt", (0.0,), 0.0),
        ("sqrt", (INF,), INF),
        ("sqrt", (136.0,), None),  # torch's own is off by one bit in fp32
    ],
)
def test_exact(name: str, values: tuple[float, ...], result: float | None) -> None:
    assert repr(exact(name, values)) == repr(result)


# ---------------------------------------------------------------- rules


def chosen(a: float, b: float) -> Node:
    return op("where", CAUSAL, a, b)


def test_a_comparison_of_a_choice_is_its_condition() -> None:
    ones = chosen(1.0, 0.0)
    assert op("eq", ones, 1.0) is CAUSAL and op("ne", ones, 0.0) is CAUSAL and op("gt", ones, 0.5) is CAUSAL
    assert op("eq", ones, 0.0) is op("not", CAUSAL) and op("lt", ones, 1.0) is op("not", CAUSAL)
    assert op("eq", ones, 2.0) is const(False) and op("ge", ones, 0.0) is const(True)
    assert op("to_bool", ones) is CAUSAL and op("to_bool", chosen(math.nan, 0.0)) is CAUSAL
    assert op("to_bool", op("sub", 1.0, ones)) is op("not", CAUSAL)
    assert op("eq", op("to_int", ones), 1) is CAUSAL
    assert op("xor", op("eq", ones, 1.0), True) is op("not", CAUSAL)


def test_arithmetic_goes_into_the_branches() -> None:
    ones = chosen(1.0, 0.0)
    assert op("mul", op("sub", 1.0, ones), -1e4) is chosen(-0.0, -1e4)
    assert op("mul", op("sub", 1.0, op("to_float", CAUSAL)), -1e4) is chosen(-0.0, -1e4)
    assert op("log", ones) is chosen(0.0, -INF)
    assert op("mul", ones, -INF) == chosen(-INF, math.nan), "0 * inf is NaN"
    assert op("add", ones, op("where", op("not", CAUSAL), -INF, 0.0)) is chosen(1.0, -INF)
    other = op("where", op("le", K, 3), 1.0, 0.0)
    assert op("add", ones, other).op == "add", "two conditions"
    assert op("log", chosen(2.0, 0.0)).op == "log"


def test_choices_of_choices() -> None:
    never = chosen(0.0, -INF)
    assert op("where", CAUSAL, 0.0, op("where", op("not", CAUSAL), -INF, op("to_float", CAUSAL))) is never
    assert op("where", op("not", CAUSAL), SCORE, -INF) is op("where", CAUSAL, -INF, SCORE)
    other = op("lt", K, 3)
    assert op("where", CAUSAL, other, False) is op("and", CAUSAL, other)
    assert op("where", CAUSAL, True, other) is op("or", CAUSAL, other)
    assert op("where", CAUSAL, False, other) is op("and", op("not", CAUSAL), other)
    assert op("where", CAUSAL, other, True) is op("or", op("not", CAUSAL), other)
    assert op("where", CAUSAL, CAUSAL, other) is op("or", CAUSAL, other)


def test_what_is_subtracted_is_added() -> None:
    assert op("sub", SCORE, chosen(0.0, 1e30)) is op("add", SCORE, chosen(-0.0, -1e30))
    assert op("sub", SCORE, 5.0).op == "sub"


def test_a_branch_that_reads_a_tensor_stays_for_its_gradient() -> None:
    """Where it is not chosen, a derivative of 0 times infinity is NaN in eager."""
    root = op("where", CAUSAL, op("where", CAUSAL, SCORE, op("sqrt", SCORE)), 0.0)
    assert any(n.op == "sqrt" for n in root.args[1].args)


def test_a_mask_of_data_is_one_choice_too() -> None:
    keep = load(0, "bool", [index("b"), K])
    root = op("add", SCORE, op("mul", op("sub", 1.0, op("to_float", keep)), LOWEST))
    assert root is op("add", SCORE, op("where", keep, -0.0, LOWEST))
    assert Program(root, (Capture("bool", 2),)).text
