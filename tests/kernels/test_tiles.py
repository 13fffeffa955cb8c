"""Tile bounds against brute force over every (q, k): sound always, tight where the mask is one range."""

from __future__ import annotations

import math

import pytest
import torch
from fusion_kernels.evaluate import Box, Environment, evaluate, integer
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, param, size
from fusion_kernels.tiles import Bounds, fill, full_program, key_mask, kv_bounds, no_bounds, q_bounds
from hypothesis import given, settings
from hypothesis import strategies as st

Q, K = index("q"), index("k")
LOWEST = torch.finfo(torch.float32).min


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


CAUSAL = op("le", K, Q)


def masked(p: Node, value: float = -math.inf) -> Program:
    return Program(op("where", p, SCORE, value), params=1)


def window(w: int) -> Node:
    return op("and", CAUSAL, op("gt", K, op("sub", Q, w)))


# ---------------------------------------------------------------- strategies

small = st.integers(-40, 40)
positive = st.integers(1, 40)
uniform = st.one_of(small.map(const), st.just(param(0)), st.just(op("sub", size("M"), size("N"))), st.just(index("h")))
compare = st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])


@st.composite
def side(draw: st.DrawFn, x: Node) -> Node:
    """An expression monotone in the index x."""
    node = x
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            node = op("add", node, draw(uniform))
        elif kind == 1:
            node = op("mul", node, draw(st.sampled_from([-3, -1, 2, 3])))
        elif kind == 2:
            node = op("floordiv", node, draw(positive))
        elif kind == 3:
            node = op("sub", draw(uniform), node)
        elif kind == 4:
            node = op("maximum", node, draw(uniform))
        else:
            node = op("minimum", draw(uniform), node)
    return node


@st.composite
def atom(draw: st.DrawFn) -> Node:
    kind = draw(st.integers(0, 9))
    relation = draw(compare)
    if kind <= 1:
        return op(relation, K, op("add", Q, draw(uniform)))
    if kind == 2:
        return op(relation, op("sub", Q, K), draw(uniform))
    if kind == 3:
        return op(relation, op("abs", op("sub", Q, K)), draw(small))
    if kind == 4:
        c = draw(positive)
        return op(relation, op("floordiv", Q, c), op("floordiv", K, c))
    if kind == 5:
        return op(relation, draw(st.sampled_from([Q, K])), draw(uniform))
    if kind == 6:
        return op(relation, op("mod", K, draw(positive)), 0)
    if kind == 7:
        return op(relation, op("to_float", K), op("to_float", op("add", Q, draw(small))))
    if kind == 8:
        return op(relation, draw(side(Q)), draw(side(K)))
    return op(relation, op("floordiv", op("sub", Q, K), draw(positive)), draw(small))


def join(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    two = st.tuples(st.sampled_from(["and", "or", "and", "or", "xor"]), children, children).map(lambda t: op(*t))
    three = st.tuples(children, children, children).map(lambda t: op("where", *t))
    return st.one_of(two, two, three, children.map(lambda p: op("not", p)))


predicate = st.recursive(atom(), join, max_leaves=4)
mask_value = st.sampled_from([-math.inf, -1e4, -1e9, LOWEST])


@st.composite
def scores(draw: st.DrawFn) -> Node:
    x = op("mul", SCORE, 0.125)
    for _ in range(draw(st.integers(1, 3))):
        p, c = draw(predicate), draw(mask_value)
        data = load(0, "bool", [Q, K])
        form = draw(st.integers(0, 8))
        finite = LOWEST if c == -math.inf else c
        if form == 0:
            x = op("where", p, x, c)
        elif form == 1:
            x = op("where", p, c, x)
        elif form == 2:
            x = op("add", x, op("where", p, 0.0, c))
        elif form == 3:
            x = op("add", x, op("mul", op("sub", 1.0, op("to_float", p)), finite))
        elif form == 4:
            x = op("where", op("and", p, data), x, c)
        elif form == 5:
            x = op("where", op("or", op("not", data), p), x, c)
        elif form == 6:  # an or-form spread over two nodes
            x = op("where", p, x, op("where", draw(predicate), x, c))
        elif form == 7:
            x = op("minimum", x, op("where", p, op("mul", op("to_float", p), 50.0), c))
        else:  # the old style: s * m - big * (1 - m)
            m = op("to_float", p)
            x = op("sub", op("mul", x, m), op("mul", op("sub", 1.0, m), 1e4))
    return x


# ---------------------------------------------------------------- brute force


def dense(root: Node, n: int, m: int, p0: int, h: int, score: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    box = Box((0, 1), (h, h + 1), (0, n), (0, m))
    sizes = {"B": 1, "H": 3, "N": n, "M": m}
    env = Environment(box, sizes, [data], [p0], torch.float32, torch.device("cpu"), score=score)
    (value,) = evaluate([root], env)
    return torch.as_tensor(value).expand(1, 1, n, m)[0, 0]


def ends(bounds: Bounds) -> tuple[Node, Node, Node, Node]:
    return bounds.lo, bounds.hi, bounds.full_lo, bounds.full_hi


def clamp(node: Node, sizes: dict[str, int], p0: int, indices: dict[str, int], top: int) -> int:
    return min(max(integer(node, sizes, [p0], indices), 0), top)


def check(program: Program, bounds: Bounds | None, over: str, n: int, m: int, p0: int, h: int, first: int, last: int) -> None:
    """Every promise of the bounds, for one tile first..last."""
    if bounds is None:
        return
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(1, 1, n, m, generator=generator)
    data = torch.rand(n, m, generator=generator) < 0.5
    value = dense(program.root, n, m, p0, h, score, data)
    free = dense(full_program(program).root, n, m, p0, h, score, data)
    if over == "q":
        value, free = value.T, free.T
    tile = "q" if over == "k" else "k"
    sizes = {"B": 1, "H": 3, "N": n, "M": m}
    indices = {"b": 0, "h": h, tile + "0": first, tile + "1": last}
    top = m if over == "k" else n
    lo, hi, full_lo, full_hi = (clamp(x, sizes, p0, indices, top) for x in ends(bounds))
    rows = slice(first, last + 1)
    skipped = torch.cat([value[rows, :lo].flatten(), value[rows, max(hi, lo) :].flatten()])
    assert bool((skipped <= fill(program)).all()), (lo, hi)
    full_hi = max(full_lo, full_hi)
    torch.testing.assert_close(free[rows, full_lo:full_hi], value[rows, full_lo:full_hi], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=300, deadline=None)
@given(scores(), st.integers(1, 70), st.integers(1, 70), small, st.integers(0, 2), st.data())
def test_bounds_never_cut_a_live_element(root: Node, n: int, m: int, p0: int, h: int, data: st.DataObject) -> None:
    program = Program(root, (Capture("bool", 2),), 1)
    for over, length, bounds in (("k", n, kv_bounds(program)), ("q", m, q_bounds(program))):
        first = data.draw(st.integers(0, length - 1))
        last = data.draw(st.integers(first, length - 1))
        check(program, bounds, over, n, m, p0, h, first, last)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(-50, 50), st.integers(1, 60), st.integers(1, 40), st.data())
def test_causal_and_window_are_tight(n: int, m: int, offset: int, w: int, tile: int, data: st.DataObject) -> None:
    q = op("add", Q, offset)
    near = op("and", op("le", K, q), op("gt", K, op("sub", q, w)))
    first = data.draw(st.integers(0, n - 1))
    last = min(first + tile - 1, n - 1)
    for p in (op("le", K, q), near, op("le", op("abs", op("sub", q, K)), w)):
        program = masked(p)
        bounds = kv_bounds(program)
        assert bounds is not None
        sizes, indices = {"B": 1, "H": 3, "N": n, "M": m}, {"q0": first, "q1": last, "b": 0, "h": 0}
        lo, hi, full_lo, full_hi = (clamp(x, sizes, 0, indices, m) for x in ends(bounds))
        live = dense(program.root, n, m, 0, 0, torch.zeros(1, 1, n, m), torch.ones(1, 1)) == 0
        some = live[first : last + 1].any(0).nonzero().flatten().tolist()
        every = live[first : last + 1].all(0).nonzero().flatten().tolist()
        assert list(range(lo, hi)) == some
        assert list(range(full_lo, full_hi)) == every


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.integers(1, 40), st.data())
def test_blocks_and_prefix_are_tight(n: int, c: int, tile: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n - 1))
    last = min(first + tile - 1, n - 1)
    block = op("eq", op("floordiv", Q, c), op("floordiv", K, c))
    chunked = op("and", CAUSAL, block)
    prefix = op("or", CAUSAL, op("lt", K, c))
    for p in (block, chunked, prefix):
        bounds = kv_bounds(masked(p))
        assert bounds is not None
        sizes, indices = {"B": 1, "H": 3, "N": n, "M": n}, {"q0": first, "q1": last, "b": 0, "h": 0}
        lo, hi, full_lo, full_hi = (clamp(x, sizes, 0, indices, n) for x in ends(bounds))
        live = dense(masked(p).root, n, n, 0, 0, torch.zeros(1, 1, n, n), torch.ones(1, 1)) == 0
        some = live[first : last + 1].any(0).nonzero().flatten().tolist()
        every = live[first : last + 1].all(0).nonzero().flatten().tolist()
        assert list(range(lo, hi)) == some
        assert list(range(full_lo, full_hi)) == every


# ---------------------------------------------------------------- masks of whole keys, as tensors have them


@st.composite
def padded_scores(draw: st.DrawFn) -> Node:
    """A score masked by positions, by tensors along k (captures 1 and 2), or by both in one predicate."""
    x = draw(st.one_of(st.just(op("mul", SCORE, 0.125)), scores()))
    for _ in range(draw(st.integers(1, 3))):
        pad = load(1, "bool", [index("h"), K])
        ids = load(2, "int", [K])
        keys = draw(st.sampled_from([pad, op("not", pad), op("ne", ids, 0), op("lt", K, ids), op("and", pad, op("gt", ids, 2))]))
        p, c = draw(predicate), draw(mask_value)
        form = draw(st.integers(0, 6))
        if form == 0:
            x = op("where", keys, x, c)
        elif form == 1:
            x = op("where", op("and", p, keys), x, c)
        elif form == 2:
            x = op("where", op("or", op("not", p), op("not", keys)), c, x)
        elif form == 3:
            x = op("add", x, op("where", op("and", keys, p), 0.0, LOWEST))
        elif form == 4:
            x = op("add", x, op("mul", op("sub", 1.0, op("to_float", keys)), LOWEST))
        elif form == 5:  # neither decides by itself
            x = op("where", op("or", p, keys), x, c)
        else:
            x = op("where", p, op("where", keys, x, c), c)
    return x


@settings(max_examples=200, deadline=None)
@given(padded_scores(), st.integers(1, 40), st.integers(1, 40), small, st.integers(0, 2))
def test_a_dead_key_is_dead_for_every_row(root: Node, n: int, m: int, p0: int, h: int) -> None:
    program = Program(root, (Capture("bool", 2), Capture("bool", 2), Capture("int", 1)), 1)
    mask = key_mask(program)
    free = full_program(program, keys=True)
    if mask is None:
        assert free is full_program(program) or free.root is full_program(program).root
        assert fill(program, keys=True) == fill(program)
        return
    generator = torch.Generator().manual_seed(0)
    data = [torch.rand(n, m, generator=generator) < 0.5, torch.rand(3, m, generator=generator) < 0.6]
    data.append(torch.randint(0, m + 1, (m,), generator=generator))
    score = torch.randn(1, 1, n, m, generator=generator)

    def values(node: Node) -> torch.Tensor:
        box = Box((0, 1), (h, h + 1), (0, n), (0, m))
        env = Environment(box, {"B": 1, "H": 3, "N": n, "M": m}, data, [p0], torch.float32, score.device, score=score)
        return torch.as_tensor(evaluate([node], env)[0]).expand(1, 1, n, m)[0, 0]

    alive, value = values(mask), values(program.root)
    assert torch.equal(alive, alive[:1].expand(n, m)), "a key is dead for all rows or for none"
    assert bool((value[~alive] <= fill(program, keys=True)).all())
    bounds = kv_bounds(program) or no_bounds(program, "k")
    sizes, indices = {"B": 1, "H": 3, "N": n, "M": m}, {"b": 0, "h": h, "q0": 0, "q1": n - 1}
    full = [clamp(x, sizes, p0, indices, m) for x in (bounds.full_lo, bounds.full_hi)]
    inside = torch.zeros(n, m, dtype=torch.bool)
    inside[:, full[0] : full[1]] = True
    both = inside & alive
    torch.testing.assert_close(values(free.root)[both], value[both], rtol=0, atol=0, equal_nan=True)


def test_padding_is_found_in_the_ways_that_it_is_written() -> None:
    pad, x = load(0, "bool", [index("b"), K]), op("mul", SCORE, 0.125)
    length = op("lt", K, load(1, "int", [index("b")]))
    both = op("and", CAUSAL, pad)
    for root, mask in (
        (op("where", pad, x, -math.inf), pad),
        (op("where", op("not", pad), -1e9, x), pad),
        (op("add", x, op("where", both, 0.0, LOWEST)), pad),
        (op("where", CAUSAL, op("where", pad, x, -1e9), -math.inf), pad),
        (op("where", length, x, -math.inf), length),
        (op("where", op("and", both, length), x, -math.inf), op("and", pad, length)),
    ):
        program = Program(root, (Capture("bool", 2), Capture("int", 1)))
        assert key_mask(program) is mask
        assert full_program(program, keys=True).root is x
    assert fill(Program(op("where", CAUSAL, op("where", pad, x, -1e9), -math.inf)), keys=True) > -1.1e9


@pytest.mark.parametrize(
    "root",
    [
        op("where", load(0, "bool", [Q, K]), SCORE, -math.inf),  # not of whole keys
        op("where", op("eq", load(1, "int", [Q]), load(1, "int", [K])), SCORE, -math.inf),
        op("where", op("gt", SCORE, op("to_float", load(1, "int", [K]))), SCORE, -math.inf),
        op("where", op("or", CAUSAL, op("ne", load(1, "int", [K]), 0)), SCORE, -math.inf),  # a prefix: causal keys stay
        op("where", op("ne", load(1, "int", [K]), 0), SCORE, -10.0),  # not a mask: exp(-10) counts
        op("where", op("lt", K, 5), SCORE, -math.inf),  # structure knows it
    ],
)
def test_what_no_tensor_decides_for_whole_keys(root: Node) -> None:
    assert key_mask(Program(root, (Capture("bool", 2), Capture("int", 1)))) is None


# ---------------------------------------------------------------- particular promises


def test_full_program_has_no_structural_mask() -> None:
    scaled = op("mul", SCORE, 0.125)
    data = load(0, "bool", [index("b"), K])
    for root, free in (
        (op("where", CAUSAL, scaled, -math.inf), scaled),
        (op("add", scaled, op("where", window(5), 0.0, LOWEST)), scaled),
        (op("add", scaled, op("mul", op("sub", 1.0, op("to_float", CAUSAL)), LOWEST)), scaled),
        (op("where", op("and", CAUSAL, data), scaled, -1e9), op("where", data, scaled, -1e9)),
        (op("where", op("lt", K, 7), scaled, op("where", CAUSAL, scaled, -math.inf)), scaled),
    ):
        assert full_program(Program(root)).root is free


def test_a_mask_absorbs_scores_but_not_what_is_nan_by_itself() -> None:
    hidden = op("where", load(0, "bool", [Q, K]), -math.inf, SCORE)
    added = op("where", CAUSAL, 0.0, LOWEST)
    captures = (Capture("bool", 2), Capture("int", 1))
    assert kv_bounds(Program(op("add", hidden, added), captures)) is not None
    zero = op("mul", hidden, op("to_float", load(1, "int", [K])))  # -inf * 0
    assert kv_bounds(Program(op("add", zero, added), captures)) is None


def test_the_old_gpt2_mask_is_a_mask() -> None:
    m = op("to_float", CAUSAL)
    program = Program(op("sub", op("mul", SCORE, m), op("mul", op("sub", 1.0, m), 1e4)))
    assert kv_bounds(program) is not None
    assert -1e4 <= fill(program) <= -9900


@pytest.mark.parametrize(
    "root",
    [
        op("mul", SCORE, 0.125),
        op("where", load(0, "bool", [Q, K]), SCORE, -math.inf),  # decided by data
        op("where", CAUSAL, SCORE, -10.0),  # not a mask: exp(-10) counts
        op("add", SCORE, op("where", CAUSAL, 0.0, -1e4)),  # a score of 1e4 would still count
        op("where", CAUSAL, SCORE, op("mul", SCORE, 0.5)),
        op("where", CAUSAL, -math.inf, op("where", CAUSAL, SCORE, -math.inf)),  # dead everywhere
    ],
)
def test_nothing_to_skip(root: Node) -> None:
    program = Program(root, (Capture("bool", 2),))
    assert kv_bounds(program) is None or integer(kv_bounds(program).lo, {"M": 9, "N": 9}, [], {"q0": 0, "q1": 3}) == 0  # type: ignore[union-attr]
    if full_program(program) is program:
        assert kv_bounds(program) is None and q_bounds(program) is None and fill(program) == -math.inf


def test_the_fill_of_a_finite_mask_leaves_room_for_a_row_of_masked_scores() -> None:
    for value in (LOWEST, -1e9, -1e4, -1000.0):
        bound = fill(masked(CAUSAL, value))
        assert value <= bound
        assert torch.tensor(value) < torch.tensor(bound, dtype=torch.float32) + 128, "a fully masked row must visit every key"
    assert fill(masked(CAUSAL)) == -math.inf


def test_causal_reads_as_one_would_write_it() -> None:
    bounds = kv_bounds(masked(CAUSAL))
    assert bounds is not None
    assert bounds.lo is const(0)
    assert bounds.hi is op("minimum", op("add", index("q1"), 1), size("M"))
    assert bounds.full_hi is op("minimum", op("add", index("q0"), 1), size("M"))


@settings(max_examples=50, deadline=None)
@given(st.integers(2**31, 2**62))
def test_a_huge_window_does_not_overflow_32_bits(w: int) -> None:
    bounds = kv_bounds(masked(window(w)))
    assert bounds is not None
    lo = integer(bounds.lo, {"M": 100, "N": 100}, [], {"q0": 5, "q1": 9})
    assert lo == 0
