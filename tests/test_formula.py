"""What the report says of a mask: by position, by tensors that hide keys from every query, or nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load

from fusion_pass.formula import formula, mask_facts

Q, K, B, H = index("q"), index("k"), index("b"), index("h")
KEEP = load(0, "bool", [B, K])
CAUSAL = apply("le", K, Q)
NEVER = const(-math.inf)


def masked(p: Node, *captures: Capture) -> Program:
    return Program(apply("where", p, SCORE, NEVER), captures)


PAIR, ADDED = load(0, "bool", [Q, K]), load(0, "float", [Q, K])
SAME = apply("eq", load(0, "int", [B, Q]), load(0, "int", [B, K]))
FACTS: dict[str, tuple[Program, str, bool]] = {
    "none": (Program(SCORE), "full: no key is known to be masked from positions alone", False),
    "causal": (masked(CAUSAL), "causal: k <= q", True),
    "window": (
        masked(apply("and", CAUSAL, apply("lt", apply("sub", Q, K), const(64)))), "causal: k <= q and k >= q - 63", True,
    ),
    "padding": (masked(KEEP, Capture("bool", 2)), "padding: keep[b, k]", True),
    "no padding": (masked(apply("not", KEEP), Capture("bool", 2)), "padding: not keep[b, k]", True),
    "both": (masked(apply("and", CAUSAL, KEEP), Capture("bool", 2)), "causal: k <= q; padding: keep[b, k]", True),
    "by query and key": (masked(PAIR, Capture("bool", 2)), "by query and key: keep[q, k]", True),
    "documents": (
        masked(apply("and", CAUSAL, SAME), Capture("int", 2)), "causal: k <= q; by query and key: keep[b, q] == keep[b, k]", True,
    ),
    "added": (Program(apply("add", SCORE, ADDED), (Capture("float", 2),)), "by query and key: keep[q, k] > -1e+30", True),
    "a bias of heads": (
        Program(apply("add", SCORE, load(0, "float", [H, Q, K])), (Capture("float", 3),)),
        "full: no key is known to be masked from positions alone", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_mask_facts(name: str) -> None:
    program, text, skips = FACTS[name]
    facts = mask_facts(program, ["keep"], [])
    assert (facts.text, facts.skips) == (text, skips)


def test_a_learned_bias_is_no_mask() -> None:
    program = FACTS["added"][0]
    assert not mask_facts(program, ["bias"], [], learned=(0,)).skips


def test_formula() -> None:
    program = masked(apply("and", CAUSAL, KEEP), Capture("bool", 2))
    assert formula(program, ["keep"], []) == "softmax(where(k <= q and keep[b, k], q k^T, -inf))"


def test_formula_with_a_sink() -> None:
    program = Program(apply("mul", SCORE, const(0.125)), (Capture("float", 1),), zero_rows=True, sink=load(0, "float", [H]))
    assert formula(program, ["sinks"], []) == "softmax([q k^T / 8, sinks[h]])"


def test_formula_with_a_weight() -> None:
    seen = load(0, "bool", [B, K])
    program = Program(apply("mul", SCORE, const(0.125)), (Capture("bool", 2),))
    weights = {
        "softmax(q k^T / 8) * keep[b, k]": apply("mul", SCORE, apply("to_float", seen)),
        "where(keep[b, k], softmax(q k^T / 8), 0)": apply("where", seen, SCORE, const(0.0)),
        "where(isnan(p), 0, p) of p = softmax(q k^T / 8)": apply("where", apply("isnan", SCORE), const(0.0), SCORE),
    }
    for text, weight in weights.items():
        assert formula(replace(program, weight=weight), ["keep"], []) == text


def test_formula_of_a_condition_that_does_not_hold() -> None:
    after = apply("where", apply("not", CAUSAL), const(-math.inf), const(-0.0))
    program = Program(apply("add", SCORE, after))
    assert formula(program, [], []) == "softmax(q k^T + where(k <= q, 0, -inf))"
    odd = apply("or", apply("not", CAUSAL), apply("eq", K, const(0)))
    assert formula(masked(odd), [], []) == "softmax(where(k > q or k == 0, q k^T, -inf))"
