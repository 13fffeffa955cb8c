"""What the Triton kernels are tested on: programs, shapes, a dense reference, and the error rule. Shared by CPU and GPU tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fusion_kernels.backward import attention_backward
from fusion_kernels.configs import Tile
from fusion_kernels.evaluate import Box, Environment, evaluate
from fusion_kernels.forward import attention_forward
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, param

Q, K, B, H = index("q"), index("k"), index("b"), index("h")
NEVER = const(-math.inf)
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    n: int
    m: int
    d: int
    dv: int


@dataclass
class Case:
    program: Program
    captures: list[torch.Tensor]
    params: tuple[int, ...] = ()

    @property
    def wrt(self) -> tuple[int, ...]:
        return tuple(i for i, c in enumerate(self.captures) if c.is_floating_point())


def _scaled(shape: Shape) -> Node:
    return apply("mul", SCORE, const(shape.d**-0.5))


def _masked(shape: Shape, predicate: Node, fill: float = -math.inf) -> Case:
    return Case(Program(apply("where", predicate, _scaled(shape), const(fill))), [])


CAUSAL = apply("ge", Q, K)
BAND = apply("and", CAUSAL, apply("lt", apply("sub", Q, K), const(16)))
BLOCKS = apply("eq", apply("floordiv", Q, const(32)), apply("floordiv", K, const(32)))


def _alibi(s: Shape) -> Case:
    bias = apply("mul", load(0, "float", [H]), apply("to_float", apply("sub", K, Q)))
    root = apply("where", CAUSAL, apply("add", _scaled(s), bias), NEVER)
    return Case(Program(root, (Capture("float", 1),)), [torch.rand(s.heads) * 0.2 + 0.01])


def _softcap(s: Shape) -> Case:
    return Case(Program(apply("mul", apply("tanh", apply("div", _scaled(s), const(5.0))), const(5.0))), [])


def _padding(s: Shape) -> Case:
    keep = torch.rand(s.batch, s.m) > 0.3
    keep[:, 0] = True
    return Case(Program(apply("where", load(0, "bool", [B, K]), _scaled(s), NEVER), (Capture("bool", 2),)), [keep])


def _bias(s: Shape) -> Case:
    program = Program(apply("add", _scaled(s), load(0, "float", [const(0), H, Q, K])), (Capture("float", 4),))
    return Case(program, [torch.randn(1, s.heads, s.n, s.m)])


def _own_bias(s: Shape) -> Case:
    program = Program(apply("add", _scaled(s), load(0, "float", [B, H, Q, K])), (Capture("float", 4),))
    return Case(program, [torch.randn(s.batch, s.heads, s.n, s.m)])


def _lowest_mask(s: Shape) -> Case:
    """An additive mask of finfo.min, as transformers builds it, with one row that it hides completely."""
    mask = torch.where(torch.rand(s.batch, 1, s.n, s.m) > 0.3, 0.0, LOWEST)
    mask[:, :, 0] = LOWEST
    return Case(Program(apply("add", _scaled(s), load(0, "float", [B, const(0), Q, K])), (Capture("float", 4),)), [mask])


def _far(s: Shape) -> Case:
    """Biases so large, for 16 rows each, that a score times log2(e) has no digits left for what it is: first, last, or alone."""
    bias = torch.randn(s.n, s.m)
    half = s.m // 2
    for start in range(0, s.n, 16):
        rows, kind = bias[start : start + 16], start // 16 % 8
        if kind in (1, 2, 4, 7):
            rows[:, :half] = {1: LOWEST, 2: -1e9, 4: -7e4, 7: -math.inf}[kind]
        elif kind == 3:
            rows[:] = LOWEST
        elif kind == 5:
            rows -= 65536.0  # on both sides of the least that the kernels take for near
        elif kind == 6:
            rows[:, half:] += 7e4
    return Case(Program(apply("add", _scaled(s), load(0, "float", [Q, K])), (Capture("float", 2),)), [bias])


def _relative(s: Shape) -> Case:
    """A table read at q - k: one element of it belongs to a whole diagonal."""
    reach = max(s.n, s.m)
    index_ = apply("add", apply("sub", Q, K), const(reach))
    program = Program(apply("add", _scaled(s), load(0, "float", [index_, H])), (Capture("float", 2),))
    return Case(program, [torch.randn(2 * reach + 1, s.heads)])


def _keys(s: Shape) -> Case:
    factor = apply("mul", load(0, "float", [H, K]), const(0.5))
    return Case(Program(apply("mul", _scaled(s), factor), (Capture("float", 2),)), [torch.randn(s.heads, s.m)])


def _rows(s: Shape) -> Case:
    return Case(Program(apply("mul", _scaled(s), load(0, "float", [B, Q])), (Capture("float", 2),)), [torch.randn(s.batch, s.n)])


def _documents(s: Shape) -> Case:
    ids = torch.sort(torch.randint(0, 3, (s.batch, max(s.n, s.m))), -1).values
    same = apply("eq", load(0, "int", [B, Q]), load(0, "int", [B, K]))
    return Case(Program(apply("where", same, _scaled(s), NEVER), (Capture("int", 2),)), [ids])


def _offset(s: Shape) -> Case:
    """Causal with a cache: the first query is at position params[0]."""
    root = apply("where", apply("ge", apply("add", Q, param(0)), K), _scaled(s), NEVER)
    return Case(Program(root, (), 1), [], (3,))


def _math(s: Shape) -> Case:
    """Every float operation once, kept where all of them are defined, and of moderate size."""
    x = apply("mul", SCORE, const(0.3 * s.d**-0.5))
    size = apply("add", apply("abs", x), const(0.5))
    parts = [apply(op, size) for op in ("log", "sqrt", "rsqrt", "exp", "log1p")]
    parts += [apply(op, x) for op in ("sin", "cos", "erf", "sigmoid", "expm1", "tanh")]
    parts.append(apply("pow", size, const(1.5)))
    parts.append(apply("maximum", x, apply("minimum", size, const(0.7))))
    total = parts[0]
    for part in parts[1:]:
        total = apply("add", total, apply("mul", part, const(0.3)))
    return Case(Program(total), [])


def _sink(s: Shape) -> Case:
    """A learned sink a head (gpt-oss), as large as the scores; the last head has none."""
    root = apply("where", CAUSAL, _scaled(s), const(LOWEST))
    z = torch.randn(s.heads)
    z[-1] = -math.inf if s.heads > 1 else 1.0
    return Case(Program(root, (Capture("float", 1),), zero_rows=True, sink=load(0, "float", [H])), [z])


def _sink_of_rows(s: Shape) -> Case:
    """A sink a row, of a tensor that the scores read too. Row 0 sees no key: it is the sink's."""
    root = apply("where", apply("lt", K, Q), apply("add", _scaled(s), load(0, "float", [B, H, Q])), NEVER)
    sink = apply("mul", load(0, "float", [B, H, Q]), const(2.0))
    return Case(Program(root, (Capture("float", 3),), zero_rows=True, sink=sink), [torch.randn(s.batch, s.heads, s.n)])


def _low(s: Shape) -> Case:
    """Scores as low as a mask, of which the factor is taken out where there is none: a row's base has the units of both."""
    x = apply("mul", apply("add", SCORE, const(-9000.0)), const(0.125))
    return Case(Program(apply("where", CAUSAL, x, const(LOWEST))), [])


def _softmax_one(s: Shape, zero_rows: bool) -> Case:
    """1 + sum exp(x): a sink of 0. Row 0 sees no key; without `zero_rows` it is NaN."""
    return Case(Program(apply("where", apply("lt", K, Q), _scaled(s), NEVER), zero_rows=zero_rows, sink=const(0.0)), [])


def _deep_sink(s: Shape) -> Case:
    """Rows that a mask hides whole, under a sink as low as its fill."""
    root = apply("where", apply("lt", K, Q), _scaled(s), const(-1e9))
    return Case(Program(root, (Capture("float", 1),), zero_rows=True, sink=load(0, "float", [H])), [torch.full((s.heads,), -1e9)])


def _infinite(s: Shape, *, inf_rows: bool, sink: Node | None = None) -> Case:
    """A bias with +inf in its rows: once, twice, beside a NaN, and at a key that the mask hides. (Columns: near and far.)"""
    bias = torch.randn(s.n, s.m)
    near, far = 1, min(s.n, s.m) - 2
    bias[4, near] = bias[s.n - 3, near] = bias[s.n - 3, far - 2] = bias[s.n - 1, far - 2] = bias[far - 3, far] = math.inf
    bias[9, near + 1] = bias[9, near] = math.inf
    bias[11, near], bias[11, near + 1], bias[13, near] = math.inf, math.nan, math.nan
    root = apply("where", CAUSAL, apply("add", _scaled(s), load(0, "float", [Q, K])), NEVER)
    return Case(Program(root, (Capture("float", 2),), zero_rows=sink is not None, sink=sink, inf_rows=inf_rows), [bias])


def _infinite_sink(s: Shape) -> Case:
    """+inf in the sink of a few rows alone: their probabilities are 0, and their gradients NaN."""
    z = torch.randn(s.batch, s.heads, s.n)
    z[:, 0, 5] = z[0, -1, -2] = math.inf
    program = Program(_scaled(s), (Capture("float", 3),), zero_rows=True, sink=load(0, "float", [B, H, Q]), inf_rows=True)
    return Case(program, [z])


def _weighted(s: Shape, weight: Node, *captures: torch.Tensor, fill: float = -math.inf, **options: Any) -> Case:
    """Scores that no key of the last row is seen by; weights read `captures`."""
    root = apply("where", apply("lt", Q, K), _scaled(s), const(fill))
    kinds = tuple(Capture("float" if c.is_floating_point() else "bool", c.dim()) for c in captures)
    return Case(Program(root, kinds, weight=weight, **options), list(captures))


def _again(s: Shape, fill: float) -> Case:
    """A mask of its own, at -1 of which is nothing: whole rows hidden by the scores' mask are 0, or NaN where it shows a key."""
    shown = torch.rand(s.batch, s.n, s.m) > 0.4
    shown[0, -1] = False
    weight = apply("where", load(0, "bool", [B, Q, K]), SCORE, const(0.0))
    return _weighted(s, weight, shown, fill=fill)


def _weight_of_a_bias(s: Shape) -> Case:
    """A table that the scores read as well, and a factor a head."""
    table, head = load(0, "float", [B, H, Q, K]), load(1, "float", [H])
    root = apply("add", _scaled(s), table)
    weight = apply("mul", apply("mul", SCORE, head), table)
    captures = [torch.randn(s.batch, s.heads, s.n, s.m), torch.randn(s.heads)]
    return Case(Program(root, (Capture("float", 4), Capture("float", 1)), weight=weight), captures)


def _weight_beside_a_table(s: Shape) -> Case:
    """The gradient of a learned bias under a weight; past the end, the quotient is 0 / 0."""
    root = apply("add", _scaled(s), load(0, "float", [H, Q, K]))
    weight = apply("div", SCORE, load(1, "float", [B, K]))
    captures = [torch.randn(s.heads, s.n, s.m), torch.rand(s.batch, s.m) + 0.5]
    return Case(Program(root, (Capture("float", 3), Capture("float", 2)), weight=weight), captures)


def _guard_of_infinite(s: Shape) -> Case:
    """Rows of NaN, of several kinds, become 0."""
    case = _infinite(s, inf_rows=False)
    return Case(replace(case.program, weight=apply("where", apply("isnan", SCORE), const(0.0), SCORE)), case.captures)


CASES: dict[str, Callable[[Shape], Case]] = {
    "plain": lambda s: Case(Program(_scaled(s)), []),
    "causal": lambda s: _masked(s, CAUSAL),
    "causal, finfo.min": lambda s: _masked(s, CAUSAL, LOWEST),
    "strictly anticausal, -1e9": lambda s: _masked(s, apply("lt", Q, K), -1e9),  # the last row has no key: it averages over all
    "strictly anticausal, -inf": lambda s: _masked(s, apply("lt", Q, K)),  # the last row is NaN
    "window": lambda s: _masked(s, BAND),
    "blocks, -1e4": lambda s: _masked(s, BLOCKS, -1e4),
    "alibi": _alibi,
    "softcap": _softcap,
    "padding": _padding,
    "bias": _bias,
    "own bias": _own_bias,
    "lowest mask": _lowest_mask,
    "far": _far,
    "relative": _relative,
    "key factor": _keys,
    "row factor": _rows,
    "documents": _documents,
    "offset": _offset,
    "math": _math,
    "sink": _sink,
    "sink of rows": _sink_of_rows,
    "low": _low,
    "softmax one": lambda s: _softmax_one(s, zero_rows=True),
    "softmax one, NaN": lambda s: _softmax_one(s, zero_rows=False),
    "deep sink": _deep_sink,
    "infinite": lambda s: _infinite(s, inf_rows=False),
    "infinite, quotient": lambda s: _infinite(s, inf_rows=True),
    "infinite, sink": lambda s: _infinite(s, inf_rows=False, sink=const(0.5)),
    "infinite, quotient, sink": lambda s: _infinite(s, inf_rows=True, sink=const(0.5)),
    "infinite sink": _infinite_sink,
    "weight of heads": lambda s: _weighted(s, apply("mul", load(0, "float", [H]), SCORE), torch.randn(s.heads), fill=LOWEST),
    "weight of rows": lambda s: _weighted(
        s, apply("div", SCORE, load(0, "float", [B, Q])), torch.rand(s.batch, s.n) + 0.5, zero_rows=True
    ),
    "mask again": lambda s: _again(s, -math.inf),
    "mask again, -1e9": lambda s: _again(s, -1e9),
    "causal again": lambda s: _weighted(s, apply("where", apply("lt", Q, K), SCORE, const(0.0))),
    "causal again, other way": lambda s: _weighted(s, apply("where", apply("ge", Q, K), const(0.0), apply("neg", SCORE))),
    "only the hidden": lambda s: _weighted(s, apply("where", apply("ge", Q, K), SCORE, const(0.0))),
    "weight of a bias": _weight_of_a_bias,
    "weight beside a table": _weight_beside_a_table,
    "weight and sink": lambda s: _weighted(s, apply("where", apply("lt", Q, K), SCORE, const(0.0)), sink=const(0.5)),
    "guard": _guard_of_infinite,
}


@dataclass
class Operands:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    do: torch.Tensor


def operands(s: Shape, dtype: torch.dtype, device: str, transposed: bool = True) -> Operands:
    """q, k, v, do as a model makes them: (B, N, H, D) in memory if transposed, else contiguous."""

    def make(heads: int, rows: int, width: int) -> torch.Tensor:
        if transposed:
            return torch.randn(s.batch, rows, heads, width).to(device, dtype).transpose(1, 2)
        return torch.randn(s.batch, heads, rows, width).to(device, dtype)

    return Operands(make(s.heads, s.n, s.d), make(s.kv_heads, s.m, s.d), make(s.kv_heads, s.m, s.dv), make(s.heads, s.n, s.dv))


def keep_mask(seed: int, s: Shape, p: float) -> torch.Tensor:
    """The dropout mask (B, H, N, M), written out in int64 arithmetic: Philox4x32-7 for the row, a product for two keys."""
    low = 0xFFFFFFFF
    bh, q = torch.meshgrid(torch.arange(s.batch * s.heads), torch.arange(s.n), indexing="ij")

    def multiply(a: int | torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # 32 x 32 -> (high, low) words
        a_low, a_high, x_low, x_high = a & 0xFFFF, a >> 16, x & 0xFFFF, x >> 16
        first, second = a_low * x_high, a_high * x_low
        middle = (a_low * x_low >> 16) + (first & 0xFFFF) + (second & 0xFFFF)
        high = a_high * x_high + (first >> 16) + (second >> 16) + (middle >> 16)
        return high & low, (middle & 0xFFFF) << 16 | (a_low * x_low & 0xFFFF)

    c = [q, bh, torch.zeros_like(q), torch.zeros_like(q)]
    key = [seed & low, seed >> 32 & low]
    for _ in range(7):
        (high0, low0), (high1, low1) = multiply(0xD2511F53, c[0]), multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    k = torch.arange(s.m)
    first = k - 8 * (k // 8 % 2)  # of the keys k and k + 8
    high, low_part = multiply(
        c[0][..., None] + multiply(0x9E3779B9, first)[1] & low, c[1][..., None] ^ multiply(0x85EBCA6B, first)[1]
    )
    x = high ^ low_part
    x = torch.where(first == k, x << 16 & low | x >> 16, x)
    return (x >= round(p * 2**32)).view(s.batch, s.heads, s.n, s.m)


def _quotient(x: torch.Tensor) -> torch.Tensor:
    """exp(x - logsumexp(x)) where its rows are not those of softmax, whose digits it has not under a mask as low as -1e9."""
    top = x.detach().amax(-1, keepdim=True)
    return torch.where(top == math.inf, torch.exp(x - top), torch.softmax(x, -1))


def dense(
    x: Operands, case: Case, captures: list[torch.Tensor], dtype: torch.dtype, p: float = 0.0, keep: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Eager attention in `dtype`: out, dq, dk, dv, and the gradients of the float captures."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
    captures = [c.detach().to(dtype).requires_grad_() if c.is_floating_point() else c for c in captures]
    (batch, heads, n, _), m = q.shape, k.shape[2]
    group = heads // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).transpose(-1, -2)
    own = dtype  # a mask that the dtype cannot hold makes a model take its scores to fp32 before the softmax
    if any(n.op == "const" and math.isfinite(n.attr) and abs(n.attr) > torch.finfo(dtype).max for n in case.program.root.leaves):
        own = torch.float32
    env = Environment(
        Box((0, batch), (0, heads), (0, n), (0, m)), {"B": batch, "H": heads, "N": n, "M": m},
        captures, case.params, own, q.device, score=s.to(own),
    )  # fmt: skip
    (x_,) = evaluate([case.program.root], env)  # a number, if nothing is left of the score
    x_ = torch.as_tensor(x_, dtype=own, device=q.device).expand(batch, heads, n, m)
    softmax = _quotient if case.program.inf_rows else partial(torch.softmax, dim=-1)
    empty = (x_ == -math.inf).all(-1, keepdim=True)
    if case.program.sink is not None:
        (z,) = evaluate([case.program.sink], env)
        z = torch.as_tensor(z, dtype=own, device=q.device).expand(batch, heads, n, 1)
        x_ = x_ if case.program.zero_rows else x_ + torch.where(empty, math.nan, 0.0).to(own)
        weights = softmax(torch.cat([x_, z], -1))[..., :-1].to(dtype)
    else:
        empty &= case.program.zero_rows
        weights = softmax(x_.masked_fill(empty, 0.0)).masked_fill(empty, 0.0).to(dtype)
    if keep is not None:
        weights = weights * keep / (1 - p) if p < 1 else weights * 0
    if case.program.weight is not None:
        (weights,) = evaluate([case.program.weight], replace(env, score=weights, dtype=dtype, values={}))
    out = weights @ v.repeat_interleave(group, 1)
    wanted = [q, k, v, *(captures[i] for i in case.wrt)]
    gradients = torch.autograd.grad(out, wanted, x.do.to(dtype), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True))]


def fused(
    x: Operands,
    case: Case,
    captures: list[torch.Tensor],
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> list[torch.Tensor]:
    """What `dense` gives, from the Triton kernels; every output starts as NaN, so that an unwritten element shows."""
    (batch, heads, n, _), dv = x.q.shape, x.v.shape[3]
    out = torch.full((batch, n, heads, dv), math.nan, dtype=x.v.dtype, device=x.q.device).transpose(1, 2)
    lse = torch.full((batch, heads, n), math.nan, device=x.q.device)
    attention_forward(x.q, x.k, x.v, captures, case.params, case.program, p, seed, out, lse, tile)
    gradients = [torch.full_like(t, math.nan) for t in (x.q, x.k, x.v)]
    buffers = [torch.zeros(c.shape, device=c.device) if i in case.wrt else None for i, c in enumerate(captures)]
    attention_backward(
        x.do, x.q, x.k, x.v, captures, case.params, case.program, p, seed, out, lse,
        [i in case.wrt for i in range(len(captures))], *gradients, buffers, tile, tile,
    )  # fmt: skip
    return [out, *gradients, *(b for b in buffers if b is not None)]


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error over the largest exact value; infinite where NaNs or infinities disagree.

    Where the exact values cancel to zero (one key: p = 1, dp = D), over 30: sums of products that cancel are of that order.
    """
    value, exact = value.double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(value.isfinite(), finite) or not torch.equal(value.isnan(), exact.isnan()):
        return math.inf
    if not finite.any():
        return 0.0
    size = exact[finite].abs().max()
    return ((value - exact)[finite].abs().max() / (size if size > 1e-3 else 30.0)).item()


OUTPUTS = ("out", "dq", "dk", "dv", *["capture"] * 9)


def compare(
    name: str, s: Shape, dtype: torch.dtype, device: str, transposed: bool = True, p: float = 0.0, tile: Tile | None = None
) -> list[tuple[float, float]]:
    """(error of the kernels, error of eager) for out, dq, dk, dv and each capture's gradient, against eager in float64."""
    torch.manual_seed(0)
    case, x = CASES[name](s), operands(s, dtype, device, transposed)
    lowest = torch.finfo(dtype).min
    captures = [c.clamp_min(lowest).to(device, dtype) if c.is_floating_point() else c.to(device) for c in case.captures]
    keep = keep_mask(987654321987, s, p).to(device) if p > 0 else None
    exact = dense(x, case, captures, torch.float64, p, keep)
    eager = dense(x, case, captures, dtype, p, keep)
    ours = fused(x, case, captures, p, torch.tensor(987654321987, device=device) if p > 0 else None, tile)
    return [(distance(o, e), distance(r, e)) for o, r, e in zip(ours, eager, exact, strict=True)]


def allowed(what: str, eager: float, dtype: torch.dtype) -> float:
    """Twice eager's error, plus a few roundings of the output: where eager happens to be exact, we may round.

    A captured tensor's gradient may be a sum of thousands of terms that cancel: its roundings are those of the terms.
    """
    return 2 * eager + (16 if what == "capture" else 4) * torch.finfo(dtype).eps
