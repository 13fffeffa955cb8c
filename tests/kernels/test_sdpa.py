"""Programs as arguments of scaled_dot_product_attention: causal by whatever inequality, against every (q, k)."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_kernels.evaluate import Box, Environment, evaluate, integer
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, size
from fusion_kernels.ranges import inequality
from fusion_kernels.sdpa import form
from fusion_kernels.tiles import kv_bounds
from hypothesis import given, settings
from hypothesis import strategies as st

Q, K = index("q"), index("k")
SCALED = apply("mul", SCORE, const(0.125))
LOWEST = torch.finfo(torch.float32).min
SIZES = (1, 63, 129, 197)


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


CAUSAL = op("le", K, Q)
PAD = load(0, "bool", [index("b"), K])


def masked(p: Node, fill: float = -math.inf) -> Program:
    return Program(op("where", p, SCALED, fill), (Capture("bool", 2),))


def dense(p: Node, n: int) -> torch.Tensor:
    env = Environment(
        Box((0, 1), (0, 1), (0, n), (0, n)), {"B": 1, "H": 1, "N": n, "M": n}, [], [], torch.float32, torch.device("cpu")
    )
    return torch.as_tensor(evaluate([p], env)[0]).expand(1, 1, n, n)[0, 0]


@st.composite
def inequalities(draw: st.DrawFn) -> Node:
    """c (k - q) against d, its terms on either side, as numbers of any kind, perhaps negated: often causal."""
    c = draw(st.sampled_from([1, 1, -1, 2, -3]))
    left = [op("mul", K, c), op("mul", Q, -c), const(draw(st.integers(-3, 3)))]
    right = [const(draw(st.integers(-3, 3)))]
    for side, other in ((left, right), (right, left)):
        if len(side) > 1 and draw(st.booleans()):
            other.append(op("neg", side.pop(draw(st.integers(0, len(side) - 1)))))
    a, b = (
        side[0] if len(side) == 1 else op("add", side[0], side[1] if len(side) == 2 else op("add", *side[1:3]))
        for side in (left, right)
    )
    if draw(st.booleans()):
        a, b = op("to_float", a), op("to_float", b)
    p = op(draw(st.sampled_from(["lt", "le", "gt", "ge"])), a, b)
    return op("not", p) if draw(st.booleans()) else p


@settings(max_examples=300, deadline=None)
@given(inequalities())
def test_causal_is_what_no_pair_of_positions_contradicts(p: Node) -> None:
    found = form(masked(p))
    assert found is not None
    causal = all(torch.equal(dense(p, n), torch.ones(n, n).tril() == 1) for n in SIZES)
    assert found.causal == causal and (found.mask is None) == causal


@settings(max_examples=200, deadline=None)
@given(inequalities(), st.booleans())
def test_the_normal_form_is_the_inequality(p: Node, positive: bool) -> None:
    found = inequality(p, positive)
    assert found is not None
    terms, bound = found
    n = 63
    total = sum((c * dense(t, n) for t, c in terms.items()), torch.zeros(n, n))
    assert torch.equal(total <= bound, dense(p, n) == positive)


@pytest.mark.parametrize("p", [op("eq", K, Q), op("ne", K, Q), op("le", op("mul", K, Q), 3.5), PAD, op("xor", PAD, CAUSAL)])
def test_what_is_no_inequality(p: Node) -> None:
    assert inequality(p) is None and inequality(op("not", p)) is None
    found = form(masked(p))
    assert found is not None and not found.causal and found.mask is not None


@pytest.mark.parametrize(
    "p",
    [
        op("and", PAD, op("ge", Q, K)),
        op("not", op("or", op("not", PAD), op("gt", K, Q))),  # De Morgan
        op("and", op("lt", K, op("add", Q, 1)), op("and", op("ge", Q, K), PAD)),  # twice
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_causal_and_something_else(p: Node, added: bool) -> None:
    root = op("add", SCALED, op("where", p, 0.0, -math.inf)) if added else op("where", p, SCALED, -math.inf)
    found = form(Program(root, (Capture("bool", 2),)))
    assert found is not None and found.causal and found.mask is op("where", PAD, 0.0, -math.inf)


NEITHER = {
    "either": op("or", PAD, CAUSAL),
    "not both": op("not", op("and", PAD, op("gt", K, Q))),
    "strict": op("lt", K, Q),
    "one more": op("le", K, op("add", Q, 1)),
    "backwards": op("ge", K, Q),
    "two rows a key": op("le", op("mul", K, 2), Q),
    "of another index": op("le", K, index("h")),
    "of huge constants": op("le", op("add", K, 2**31), op("add", Q, 2**31 + 5)),
}


@pytest.mark.parametrize("name", NEITHER)
def test_not_causal(name: str) -> None:
    found = form(masked(NEITHER[name]))
    assert found is not None and not found.causal and found.mask is not None


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("fill", [-math.inf, LOWEST, -1e30])
def test_an_added_mask(fill: float, zero: float) -> None:
    for term in (op("where", CAUSAL, zero, fill), op("where", op("gt", K, Q), fill, zero)):
        for root in (op("add", SCALED, term), op("add", term, SCALED)):
            found = form(Program(root))
            assert found is not None and found.causal and found.mask is None and found.scale == 0.125


@pytest.mark.parametrize(
    "term", [op("where", CAUSAL, 0.0, -1e9), op("where", CAUSAL, 1.0, LOWEST), op("where", CAUSAL, -math.inf, 0.0)]
)
def test_an_added_mask_that_is_not_causal(term: Node) -> None:
    """A score could exceed 1e9; a bias stays a bias."""
    found = form(Program(op("add", SCALED, term)))
    assert found is not None and not found.causal and found.mask is term


def test_huge_constants_are_subtracted_and_divided_before_they_are_cut() -> None:
    """Cut at 2^30 on either side they would cancel, and five keys of each row would be lost."""
    bounds = kv_bounds(masked(NEITHER["of huge constants"]))
    assert bounds is not None and bounds.hi is op("minimum", op("add", index("q1"), 6), size("M"))
    bounds = kv_bounds(masked(op("le", op("mul", K, 2**15), op("add", Q, 2**40))))
    m = 10**6
    assert bounds is None or integer(bounds.hi, {"M": m, "N": m}, [], {"q0": 0, "q1": 0}) >= m
    bounds = kv_bounds(masked(op("le", op("mul", K, 2**15), 2**40)))
    assert bounds is None or integer(bounds.hi, {"M": m, "N": m}, [], {"q0": 0, "q1": 0}) == m
