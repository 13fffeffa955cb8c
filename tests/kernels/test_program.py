"""The score program: interning, folding that changes no bit, the canonical text, and its evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_kernels.evaluate import Box, Environment, evaluate, integer
from fusion_kernels.program import (
    LEAVES,
    OPS,
    SCORE,
    Capture,
    Node,
    Program,
    apply,
    const,
    index,
    load,
    param,
    parse,
    postorder,
    size,
)
from hypothesis import given, settings
from hypothesis import strategies as st

B_, H_, Q, K = (index(n) for n in "bhqk")


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


def value(
    root: Node, score: torch.Tensor, captures: list[torch.Tensor] | None = None, params: tuple[int, ...] = ()
) -> torch.Tensor:
    box = Box(*((0, n) for n in score.shape))  # type: ignore[arg-type]
    sizes = dict(zip("BHNM", score.shape, strict=True))
    (out,) = evaluate([root], Environment(box, sizes, captures or [], params, score.dtype, score.device, score=score))
    return torch.as_tensor(out, dtype=None if isinstance(out, torch.Tensor) else score.dtype).expand(score.shape)


floats = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, 0.5]),
)
FLOAT_OPS = [n for n, (_, kind) in OPS.items() if kind in ("float", "same") and n not in ("where", "to_float")]


Pair = tuple[Node, Node]  # the same expression folded and as written


@st.composite
def expressions(draw: st.DrawFn) -> Pair:
    def both(name: str, *args: Pair) -> Pair:
        return apply(name, *(a for a, _ in args)), Node.make(name, *(b for _, b in args))

    def leaf(node: Node) -> Pair:
        return node, node

    numbers = [leaf(SCORE), leaf(draw(floats.map(const))), leaf(draw(floats.map(const))), both("to_float", leaf(K))]
    integers = [leaf(n) for n in (Q, K, H_, size("M"), param(0), draw(st.integers(-9, 9).map(const)))]
    truths = [leaf(draw(st.booleans().map(const))), both("le", leaf(K), leaf(Q))]
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.integers(0, 5))
        if kind <= 1:
            name = draw(st.sampled_from(FLOAT_OPS))
            numbers.append(both(name, *(draw(st.sampled_from(numbers)) for _ in range(OPS[name][0]))))
        elif kind == 2:
            pool = draw(st.sampled_from([numbers, integers]))
            compare = draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
            truths.append(both(compare, draw(st.sampled_from(pool)), draw(st.sampled_from(pool))))
        elif kind == 3:
            name = draw(st.sampled_from(["and", "or", "xor", "not"]))
            truths.append(both(name, *(draw(st.sampled_from(truths)) for _ in range(OPS[name][0]))))
        elif kind == 4:
            pool = draw(st.sampled_from([numbers, integers, truths]))
            pool.append(both("where", draw(st.sampled_from(truths)), draw(st.sampled_from(pool)), draw(st.sampled_from(pool))))
        else:
            name = draw(st.sampled_from(["add", "sub", "mul", "neg", "maximum", "minimum"]))
            integers.append(both(name, *(draw(st.sampled_from(integers)) for _ in range(OPS[name][0]))))
    return numbers[-1]


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_the_text_is_the_program(pair: Pair) -> None:
    for root in pair:
        program = Program(root, (Capture("bool", 2),), 1)
        again = parse(program.text)
        assert again.text == program.text
        assert again.captures == program.captures and again.params == 1
        assert again.root is root


@settings(max_examples=300, deadline=None)
@given(expressions())
def test_folding_changes_no_value(pair: Pair) -> None:
    """Built with and without folding, an expression has the same values, NaN and infinities included."""
    score = torch.tensor([0.0, -1.5, 2.0, math.inf, -math.inf, math.nan], dtype=torch.float64).expand(1, 2, 3, 6)
    folded, raw = (value(root, score, params=(3,)) for root in pair)
    torch.testing.assert_close(folded, raw, rtol=0, atol=0, equal_nan=True)


def test_equal_nodes_are_one_node() -> None:
    assert op("mul", SCORE, 0.125) is op("mul", SCORE, 0.125)
    assert const(1) is not const(1.0) and const(1) is not const(True) and const(0.0) is not const(-0.0)
    assert const(math.nan) is const(math.nan)


def test_exact_folds_and_those_that_are_not() -> None:
    x = op("mul", SCORE, 0.125)
    assert op("add", x, 0.0) is x and op("mul", x, 1.0) is x and op("div", x, 1.0) is x and op("sub", x, 0.0) is x
    assert op("mul", x, 0.0).op == "mul", "inf * 0 is NaN"
    assert op("sub", x, x).op == "sub", "inf - inf is NaN"
    assert op("where", op("le", 1, 2), x, SCORE) is x
    assert op("not", op("not", op("le", K, Q))) is op("le", K, Q)
    assert op("and", True, op("le", K, Q)) is op("le", K, Q) and op("or", op("le", K, Q), True) is const(True)
    assert op("ge", Q, 0) is const(True) and op("lt", K, -3) is const(False) and op("ge", Q, 1).op == "ge"
    assert op("div", 1.0, 0.0).op == "div", "left to IEEE arithmetic"
    for name in ("maximum", "minimum"):
        assert op(name, 1.0, math.nan) is op(name, math.nan, 1.0) is const(math.nan)


@pytest.mark.parametrize(
    ("x", "half", "brain"),
    [
        (1e9, math.inf, 998244352.0),
        (-1e9, -math.inf, -998244352.0),
        (65519.0, 65504.0, 65536.0),
        (1 / 3, 0.333251953125, 0.333984375),
    ],
)
def test_rounding_constants(x: float, half: float, brain: float) -> None:
    assert op("round_float16", x) is const(half) and op("round_bfloat16", x) is const(brain)
    assert half == torch.tensor(x).half().item() and brain == torch.tensor(x).bfloat16().item()


@pytest.mark.parametrize("name", sorted(set(OPS) - {"where"}))
def test_every_operation_on_numbers_and_on_tensors(name: str) -> None:
    """One definition: a number and a tensor of one element give the same."""
    arity, _ = OPS[name]
    if name in ("floordiv", "mod"):
        samples: list[tuple[float, ...]] = [(-7, 2), (7, 2), (-8, 4), (0, 3)]
    elif name in ("and", "or", "xor", "not"):
        samples = [(a, b)[:arity] for a in (True, False) for b in (True, False)]
    else:
        samples = [(a, b)[:arity] for a in (0.5, -1.25, 2.0, 3.0) for b in (0.5, -1.25, 2.0)]
    for sample in samples:
        kinds = {bool: "bool", int: "int", float: "float"}
        nodes = tuple(Node.make("param", attr=i, kind=kinds[type(x)]) for i, x in enumerate(sample))
        root = Node.make(name, *nodes)
        box = Box((0, 1), (0, 1), (0, 1), (0, 1))
        tensors = [torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None) for x in sample]
        results = []
        for values in (sample, tensors):
            env = Environment(box, {}, [], values, torch.float64, torch.device("cpu"))  # type: ignore[arg-type]
            results.append(torch.as_tensor(evaluate([root], env)[0], dtype=torch.float64))
        torch.testing.assert_close(*results, equal_nan=True)


def test_leaves_and_order() -> None:
    bias = load(0, "float", [H_, op("sub", K, Q)])
    root = op("add", op("mul", SCORE, 2.0), bias)
    assert root.leaves == {SCORE, const(2.0), bias, H_, K, Q}
    assert root.depends_on("score") and root.depends_on("q") and not root.depends_on("b")
    order = list(postorder(root))
    assert len(order) == len(set(order)) and order[-1] is root
    assert all(order.index(a) < order.index(n) for n in order for a in n.args)
    assert {n.op for n in order if not n.args} <= LEAVES


def test_a_deep_program_does_not_recurse() -> None:
    x = SCORE
    for i in range(5000):
        x = op("add", x, float(i + 1))
    program = Program(x)
    assert parse(program.text).root is x
    assert value(x, torch.zeros(1, 1, 1, 1, dtype=torch.float64)).item() == 5000 * 5001 / 2


@pytest.mark.parametrize("zero_rows", [False, True])
@pytest.mark.parametrize("inf_rows", [False, True])
def test_the_text_says_what_rows_are(zero_rows: bool, inf_rows: bool) -> None:
    program = Program(SCORE, params=2, zero_rows=zero_rows, inf_rows=inf_rows)
    assert parse(program.text) == program
    assert ("zero_rows" in program.text, "inf_rows" in program.text) == (zero_rows, inf_rows)
    assert program.with_root(op("exp", SCORE)) == Program(op("exp", SCORE), (), 2, zero_rows, None, inf_rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with 'captures' and 'params'"),
        ("captures\nparams 0", "starts with 'captures' and 'params'"),
        ("captures\nparams 0 no_rows\n%0 = score", "cannot read 'params 0 no_rows'.* any of zero_rows, inf_rows"),
        ("captures\nparams 0\n%0 = spin", "cannot read '%0 = spin'.*unknown operation 'spin'"),
        ("captures\nparams 0\n%0 = score\n%1 = mul %0", "'mul' takes 2 arguments .* got 1"),
        ("captures\nparams 0\n%0 = exp %7", "cannot read '%0 = exp %7'"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)fusion_kernels: .*{message}"):
        parse(text)


def test_integers_of_a_tile() -> None:
    root = op("minimum", op("add", op("floordiv", index("q1"), 4), param(0)), size("M"))
    assert integer(root, {"M": 9}, [2], {"q1": 7}) == 3
    assert integer(root, {"M": 2}, [2], {"q1": 7}) == 2
