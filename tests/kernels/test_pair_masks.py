"""What a program says of masks that tensors make of pairs of a query and a key, against brute force over every (q, k)."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_kernels import configs
from fusion_kernels.codegen import pair_mask as kernel
from fusion_kernels.evaluate import Box, Environment, evaluate
from fusion_kernels.pair_ranges import asks
from fusion_kernels.program import SCORE, Capture, Node, Program, const, index, load
from fusion_kernels.tiles import fill, full_program, key_mask, pair_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import CAUSAL, LOWEST, K, Q, mask_value, op, predicate, scores, small

B, H = index("b"), index("h")
READY, WORDS, ADDED = load(0, "bool", [Q, K]), load(2, "int", [K]), load(3, "float", [Q, K])
KEYS = load(1, "bool", [H, K])
SAME = op("eq", load(2, "int", [Q]), WORDS)
CAPTURES = (Capture("bool", 2), Capture("bool", 2), Capture("int", 1), Capture("float", 2))
PAIRS = [READY, op("not", READY), SAME, op("ge", load(2, "int", [Q]), WORDS), op("gt", load(3, "float", [Q, K]), 0.5)]
PAIRS.append(op("or", READY, KEYS))


@st.composite
def paired_scores(draw: st.DrawFn) -> Node:
    """A score masked by positions, by tensors along k, by tensors along both, alone or in one predicate; or by numbers, added."""
    x = draw(st.one_of(st.just(op("mul", SCORE, 0.125)), scores()))
    for _ in range(draw(st.integers(1, 3))):
        pair, p, c = draw(st.sampled_from(PAIRS)), draw(predicate), draw(mask_value)
        form = draw(st.integers(0, 9))
        if form == 0:
            x = op("where", pair, x, c)
        elif form == 1:
            x = op("where", op("and", p, op("and", pair, KEYS)), x, c)
        elif form == 2:
            x = op("where", op("or", op("not", p), op("not", pair)), c, x)
        elif form == 3:  # a prefix, documents that all see
            x = op("where", op("or", p, pair), x, c)
        elif form == 4:  # the same in two nodes
            x = op("where", p, x, op("where", pair, x, c))
        elif form == 5:
            x = op("add", x, op("where", op("and", pair, p), 0.0, LOWEST))
        elif form == 6:
            x = op("add", x, ADDED)
        elif form == 7:
            x = op("mul", op("add", x, op("add", ADDED, load(3, "float", [const(0), K]))), 0.5)
        elif form == 8:
            x = op("minimum", x, ADDED)
        else:
            x = op("round_bfloat16", op("add", op("where", pair, x, -math.inf), ADDED))
    return x


def values(program: Program, *roots: Node, n: int, m: int, p0: int = 0, h: int = 0) -> list[torch.Tensor]:
    """The values of `roots` for tensors of which a part is a mask, (n, m) each."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor([0.0, 0.0, 0.0, -math.inf, LOWEST, -1e31, -1e9, 0.75])
    tensors = [torch.rand(n, m, generator=generator) < 0.5, torch.rand(3, m, generator=generator) < 0.6]
    tensors.append(torch.randint(0, 3, (max(n, m),), generator=generator))
    tensors.append(numbers[torch.randint(0, 8, (n, m), generator=generator)])
    score = torch.randn(1, 1, n, m, generator=generator)
    box = Box((0, 1), (h, h + 1), (0, n), (0, m))
    env = Environment(box, {"B": 1, "H": 3, "N": n, "M": m}, tensors, [p0], torch.float32, score.device, score=score)
    return [torch.as_tensor(v).expand(1, 1, n, m)[0, 0] for v in evaluate(list(roots), env)]


@settings(max_examples=400, deadline=None)
@given(paired_scores(), st.integers(1, 40), st.integers(1, 40), small, st.integers(0, 2))
def test_what_is_dead_and_what_is_plain(root: Node, n: int, m: int, p0: int, h: int) -> None:
    program = Program(root, CAPTURES, 1)
    mask = pair_mask(program)
    free = full_program(program, pairs=True)
    if mask is None:
        assert free.root is full_program(program, keys=True).root
        assert fill(program, pairs=True) == fill(program, keys=True)
        return
    where = {"n": n, "m": m, "p0": p0, "h": h}
    alive, plain, value, live = values(program, mask.alive, mask.plain, root, free.root, **where)
    assert bool((value[~alive] <= fill(program, pairs=True)).all())
    assert bool((~plain | alive).all())
    assert mask.graded or torch.equal(plain, alive)
    torch.testing.assert_close(live[plain], value[plain], rtol=0, atol=0, equal_nan=True)


def test_masks_are_found_in_the_ways_that_they_are_written() -> None:
    x = op("mul", SCORE, 0.125)
    for root, mask, low in (
        (op("where", READY, x, -math.inf), READY, -math.inf),
        (op("where", op("not", READY), -1e9, x), READY, -1e9),
        (op("add", x, op("where", op("and", CAUSAL, SAME), 0.0, LOWEST)), op("and", CAUSAL, SAME), LOWEST),
        (op("where", CAUSAL, op("where", SAME, x, -1e9), -math.inf), op("and", CAUSAL, SAME), -1e9),
        (op("where", op("or", CAUSAL, KEYS), x, -math.inf), op("or", CAUSAL, KEYS), -math.inf),
    ):
        program = Program(root, CAPTURES)
        found = pair_mask(program)
        assert found is not None and found.alive is found.plain and not found.graded
        alive, expected = values(program, found.alive, mask, n=9, m=17)
        assert torch.equal(alive, expected)
        assert full_program(program, pairs=True).root is x
        assert fill(program, pairs=True) >= low


def test_an_added_mask_is_dead_plain_or_between() -> None:
    program = Program(op("add", op("mul", SCORE, 0.125), ADDED), CAPTURES)
    mask = pair_mask(program)
    assert mask is not None and mask.graded
    alive, plain, added = values(program, mask.alive, mask.plain, ADDED, n=40, m=40)
    assert torch.equal(alive, added > -1e30) and torch.equal(plain, added == 0)
    assert full_program(program, pairs=True).root is op("mul", SCORE, 0.125)
    assert -1e30 < fill(program, pairs=True) < -0.99e30
    assert pair_mask(program, (3,)) is None, "a learned bias takes part in every score"
    assert full_program(program, pairs=True, learned=(3,)).root is program.root


@pytest.mark.parametrize(
    "root",
    [
        op("mul", SCORE, 0.125),
        op("where", CAUSAL, SCORE, -math.inf),  # structure knows it
        op("where", KEYS, SCORE, -math.inf),  # whole keys: `key_mask`
        op("where", READY, SCORE, -10.0),  # not a mask: exp(-10) counts
        op("add", SCORE, op("where", READY, 0.0, -1e4)),  # a score of 1e4 would still count
        op("where", op("gt", SCORE, op("to_float", WORDS)), SCORE, -math.inf),  # of the score
        op("where", READY, SCORE, ADDED),  # what stands in its place may be anything
        op("mul", SCORE, ADDED),
        op("tanh", op("add", SCORE, ADDED)),  # -1 at the least
        op("add", SCORE, load(3, "float", [B, const(0)])),  # of a whole batch
        op("add", SCORE, load(3, "float", [H, K])),  # heads have their own: a bias
        op("where", op("gt", op("add", op("mul", ADDED, ADDED), ADDED), 1.0), SCORE, -math.inf),  # one rounding, or two
    ],
    ids=str,
)
def test_what_no_tensor_decides_for_pairs(root: Node) -> None:
    program = Program(root, CAPTURES)
    assert pair_mask(program) is None and kernel(program) is None
    assert (key_mask(program) is None) == (root.op != "where" or root.args[0] is not KEYS)


def test_who_is_asked() -> None:
    """Many scores, and a mask that enough heads share: of all batches, for one that no batch has of its own."""
    at = configs.FEW_PAIR_SCORES
    own = Program(op("where", load(0, "bool", [B, Q, K]), SCORE, -math.inf), (Capture("bool", 3),))
    of_heads = Program(op("where", load(0, "bool", [H, Q, K]), SCORE, -math.inf), (Capture("bool", 3),))
    share = configs.PAIR_SHARERS
    n = 1 << 12
    assert share * n * n >= at
    assert asks(own, (), (1, share, n, n)) and asks(own, (), (3, share, n, n))
    assert not asks(own, (), (3, share - 1, n, n))
    assert not asks(own, (), (1, share, n, at // (share * n) - 1)) and asks(own, (), (1, share, n, at // (share * n)))
    assert asks(of_heads, (), (share, 16, n, n)) and not asks(of_heads, (), (share - 1, 16, n, n))
    assert not asks(Program(SCORE), (), (64, 64, n, n))
