"""Programs whose tensors hide keys from some queries (documents, ready-made masks), for the Triton kernels. Runs where Triton
runs: in the interpreter's process, or on a GPU. Every function here takes and gives what can be pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton_cases
from fusion_kernels import codegen, pair_ranges
from fusion_kernels.backward import attention_backward
from fusion_kernels.forward import attention_forward
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, load
from fusion_kernels.tiles import pair_mask
from key_mask_cases import FILLS, STRUCTURES, few_scores
from torch import Tensor
from triton_cases import LOWEST, B, Case, H, K, Q, Shape

ZERO = const(0)
STRUCTURED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda q, k: q >= k, "window": lambda q, k: (q >= k) & (q - k < 16), "blocks": lambda q, k: q // 32 == k // 32,
}  # fmt: skip


@dataclass(frozen=True)
class Paired:
    """masks: names of `_MASKS`, of which all have to let a pair through. structure: a name of `STRUCTURES`."""

    n: int
    m: int
    masks: tuple[str, ...]
    structure: str = "none"
    fill: str = "-inf"
    form: str = "where"  # or "nested": a where each; "added": 0 or the fill, added
    bias: bool = False  # one that is learned, [1, N, M], which all heads share
    sink: bool = False  # a learned one, a head
    weight: bool = False  # a factor a head, after the softmax
    zero_rows: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    batch: int = 2
    heads: int = 1
    kv_heads: int = 1
    d: int = 16
    seed: int = 0

    @property
    def shape(self) -> Shape:
        return Shape(self.batch, self.heads, self.kv_heads, self.n, self.m, self.d, self.d)


def _ids(p: Paired, length: int) -> Tensor:
    """(B, length) int64, rising: the document of each position."""
    return torch.randint(0, 4, (p.batch, length)).sort(-1).values


def _some(*shape: int) -> Tensor:
    """Bools in runs along the last dim, of lengths that differ: whole tiles of each kind."""
    length = shape[-1]
    ends = torch.randint(0, length + 1, (*shape[:-1], 2)).sort(-1).values
    at = torch.arange(length)
    return (at >= ends[..., :1]) & (at < ends[..., 1:])


Made = tuple[Node, list[Tensor], Tensor]  # the predicate, what it captures, and where it holds: broadcastable to (B, H, N, M)


def _documents(p: Paired, at: int) -> Made:
    """One tensor, which queries and keys share where they are as many."""
    q, k = _ids(p, p.n), _ids(p, p.m)
    k = q if p.n == p.m else k
    same = apply("eq", load(at, "int", [B, Q]), load(at + 1, "int", [B, K]))
    return same, [q, k], q[:, None, :, None] == k[:, None, None]


def _packed(p: Paired, at: int) -> Made:
    """Positions that start over with each sequence of a packed row: k may be seen where it lies as far back, or less."""
    q, k = _ids(p, p.n).abs(), _ids(p, p.m)
    return apply("ge", load(at, "int", [B, Q]), load(at + 1, "int", [B, K])), [q, k], q[:, None, :, None] >= k[:, None, None]


def _ready(p: Paired, at: int) -> Made:
    """A ready-made mask, with tiles of all kinds and a few rows without a key."""
    mask = _some(p.batch, 1, p.n, p.m)
    mask[:, :, : p.n // 3] = mask[:, :, :1]  # alike, so that whole tiles are plain
    mask[:, :, p.n // 2 : p.n // 2 + 2] = False
    return load(at, "bool", [B, ZERO, Q, K]), [mask], mask


def _hidden(p: Paired, at: int) -> Made:
    """The same the other way round, for all batches: True hides."""
    mask = ~_some(p.n, p.m)
    return apply("not", load(at, "bool", [Q, K])), [mask], ~mask


def _of_heads(p: Paired, at: int) -> Made:
    mask = _some(p.heads, 1, p.m).expand(-1, p.n, -1).clone()
    return load(at, "bool", [H, Q, K]), [mask], mask


def _none(p: Paired, at: int) -> Made:
    mask = torch.zeros(p.n, p.m, dtype=torch.bool)
    return load(at, "bool", [Q, K]), [mask], mask


def _every(p: Paired, at: int) -> Made:
    mask = torch.ones(p.n, p.m, dtype=torch.bool)
    return load(at, "bool", [Q, K]), [mask], mask


def _rows(p: Paired, at: int) -> Made:
    """Queries that see no key."""
    mask = _some(p.batch, p.n)
    return load(at, "bool", [B, Q]), [mask], mask[:, None, :, None]


def _padding(p: Paired, at: int) -> Made:
    mask = _some(p.batch, p.m)
    return load(at, "bool", [B, K]), [mask], mask[:, None, None]


def _prefix(p: Paired, at: int) -> Made:
    """Causal, but for a prefix that all see: neither position nor the tensor decides alone."""
    mask = torch.arange(p.m) < torch.randint(0, p.m + 1, (p.batch, 1))
    where = mask[:, None, None] | (torch.arange(p.n)[:, None] >= torch.arange(p.m))
    return apply("or", load(at, "bool", [B, K]), apply("ge", Q, K)), [mask], where


_MASKS: dict[str, Callable[[Paired, int], Made]] = {
    "documents": _documents, "packed": _packed, "ready": _ready, "hidden": _hidden, "of heads": _of_heads, "none": _none,
    "every": _every, "rows": _rows, "padding": _padding, "prefix": _prefix,
}  # fmt: skip
_ADDED = {
    "added": -math.inf, "added lowest": LOWEST, "added keys": LOWEST, "added between": -math.inf,
    "added far": -math.inf, "added low": -math.inf,
}  # fmt: skip


def _added(p: Paired, name: str, at: int) -> tuple[Node, Tensor]:
    """A mask of numbers, and where it lies: "between" with some that are neither 0 nor a mask, "far" with rows far above their
    plain tiles, "low" with rows so low that their log-sum-exp has no digits left."""
    dead = _ADDED[name]
    if name == "added keys":
        return load(at, "float", [B, ZERO, ZERO, K]), torch.where(_some(p.batch, 1, 1, p.m), 0.0, dead)
    if name in ("added far", "added low"):
        mask = torch.where(torch.arange(p.m) < p.m * 3 // 4, 0.0, dead).expand(p.batch, 1, p.n, -1).clone()
        if name == "added far":
            mask[:, :, 8:16, p.m // 2 :] = 1.5
        else:
            mask[:, :, -8:] = -6e4
        return apply("mul", load(at, "float", [B, ZERO, Q, K]), const(2e4)), mask
    mask = torch.where(_ready(p, at)[2], 0.0, dead)
    if name == "added between":
        mask[..., : p.m // 2] += torch.where(torch.rand(p.n, p.m // 2) < 0.1, -1e9, 0.0)
        mask[:, :, : p.n // 2] += 0.25
    return load(at, "float", [B, ZERO, Q, K]), mask


def case_of(p: Paired) -> tuple[Case, Tensor, Tensor]:
    """The program with its tensors; which pairs are alive, and which of these plain, (B, H, N, M) each."""
    torch.manual_seed(p.seed)
    x = apply("mul", SCORE, const(p.d**-0.5))
    tensors: list[Tensor] = []
    alive = torch.ones(p.batch, p.heads, p.n, p.m, dtype=torch.bool)
    plain = alive.clone()
    predicates: list[Node] = []
    if STRUCTURES[p.structure] is not None:
        predicates.append(STRUCTURES[p.structure])
        alive &= STRUCTURED[p.structure](torch.arange(p.n)[:, None], torch.arange(p.m))
    if p.bias:
        x = apply("add", x, load(0, "float", [Q, K]))
        tensors.append(torch.randn(p.n, p.m))
    for name in p.masks:
        if name in _ADDED:
            term, mask = _added(p, name, len(tensors))
            x = apply("add", x, term)
            tensors.append(mask)
            alive &= mask > -1e30
            plain &= mask == 0
            continue
        predicate, captured, where = _MASKS[name](p, len(tensors))
        predicates.append(predicate)
        tensors += captured
        alive &= where
    fill = const(FILLS[p.fill])
    if p.form == "nested":
        for predicate in predicates:
            x = apply("where", predicate, x, fill)
    elif predicates:
        both = predicates[0]
        for predicate in predicates[1:]:
            both = apply("and", both, predicate)
        added = apply("add", x, apply("where", both, const(0.0), fill))
        x = added if p.form == "added" else apply("where", both, x, fill)
    sink = weight = None
    if p.sink:
        sink = load(len(tensors), "float", [H])
        tensors.append(torch.randn(p.heads))
    if p.weight:
        weight = apply("mul", SCORE, load(len(tensors), "float", [H]))
        tensors.append(torch.randn(p.heads))
    captures = tuple(Capture(_kind(t), t.dim()) for t in tensors)
    program = Program(x, captures, zero_rows=p.zero_rows or p.sink, sink=sink, weight=weight)
    return _Fixed(program, tensors, learned=_learned(p, tensors)), alive, alive & plain


def _kind(t: Tensor) -> str:
    return "float" if t.is_floating_point() else "bool" if t.dtype == torch.bool else "int"


def _learned(p: Paired, tensors: Sequence[Tensor]) -> tuple[int, ...]:
    last = len(tensors) - p.sink - p.weight
    return (*([0] if p.bias else []), *range(last, len(tensors)))


class _Fixed(Case):
    """A case in which not every float has a gradient: masks have none."""

    def __init__(self, program: Program, captures: list[Tensor], learned: tuple[int, ...]) -> None:
        super().__init__(program, captures)
        self.learned = learned

    @property
    def wrt(self) -> tuple[int, ...]:
        return self.learned


def compare(p: Paired, device: str = "cpu") -> list[str]:
    """What is wrong with the kernels' results, a line each."""
    case, _, _ = case_of(p)
    dtype = getattr(torch, p.dtype)
    assert pair_mask(case.program, case.wrt) is not None
    x = triton_cases.operands(p.shape, dtype, device)
    captures = [c.to(device, dtype) if i in case.wrt else c.to(device) for i, c in enumerate(case.captures)]
    keep = triton_cases.keep_mask(5, p.shape, p.dropout).to(device) if p.dropout else None
    exact = triton_cases.dense(x, case, captures, torch.float64, p.dropout, keep)
    eager = triton_cases.dense(x, case, captures, dtype, p.dropout, keep)
    with few_scores(1):
        ours = triton_cases.fused(x, case, captures, p.dropout, torch.tensor(5, device=device))
    wrong = []
    for what, o, r, e in zip(triton_cases.OUTPUTS, ours, eager, exact, strict=False):
        error, theirs = triton_cases.distance(o, e), triton_cases.distance(r, e)
        if not error <= triton_cases.allowed(what, theirs, dtype):
            wrong.append(f"{what}: error {error:.2e}, eager {theirs:.2e}")
    return wrong


# ---------------------------------------------------------------- the ranges themselves


def ranges(p: Paired, rows: int, columns: int, line: int = 1024, device: str = "cpu") -> tuple[list[list[int]], list[list[int]]]:
    """(found, expected): of every batch and head, the ranges of each `rows` queries, then of each `columns` keys.

    line: how many tiles of a line are looked at together.
    """
    pair_ranges._LINE = line
    case, alive, plain = case_of(p)
    mask = codegen.pair_mask(case.program, case.wrt)
    assert mask is not None
    captures = [c.to(device) for c in case.captures]
    asked = pair_ranges.PairRanges(mask, (p.batch, p.heads, p.n, p.m), rows, columns, backward=True)
    *_, found, b_stride, h_stride, _, _ = asked(codegen.aux_arguments(case.program, captures, ()), torch.device(device))
    flat, lines = found.flatten().tolist(), found.shape[2]
    got, expected = [], []
    for b in range(p.batch):
        for h in range(p.heads):
            first = b * b_stride + h * h_stride
            got += [flat[first + 4 * i :][:4] for i in range(lines)]
            some, every = _tiles(alive[b, h], rows, columns, torch.any), _tiles(plain[b, h], rows, columns, torch.all)
            expected += [_line(s, e, columns, p.m) for s, e in zip(some, every, strict=True)]
            expected += [_line(s, e, rows, p.n) for s, e in zip(zip(*some, strict=True), zip(*every, strict=True), strict=True)]
    return got, expected


def _tiles(mask: Tensor, rows: int, columns: int, of: Callable[[Tensor], Tensor]) -> list[list[bool]]:
    return [[bool(of(part)) for part in strip.split(columns, 1)] for strip in mask.split(rows)]


def _line(some: Sequence[bool], every: Sequence[bool], unit: int, size: int) -> list[int]:
    live = [i for i, s in enumerate(some) if s]
    first = last = begin = 0
    for i, plain in enumerate(every):
        begin = begin if plain else i + 1
        if i + 1 - begin > last - first:
            first, last = begin, i + 1
    ends = (live[0], live[-1] + 1) if live else (len(some), 0)
    return [min(i * unit, size) for i in (*ends, first, last)]


# ---------------------------------------------------------------- that tiles really are skipped


def poisoned(p: Paired, few: int = 1, device: str = "cpu", block: int = 128) -> list[str]:
    """What changed, a line each, of queries and keys that share no block with document 1, when all of document 1 is NaN.

    Of a program with the mask "documents" alone (and structure). The keys and values are NaN in the forward and for dq, the
    queries and gradients of the output for dk and dv: what the forward gave is that of sound tensors.
    """
    case, _, _ = case_of(p)
    ids = torch.arange(4).repeat_interleave(p.n // 4).repeat(p.batch, 1)
    captures = [ids.to(device), ids.to(device)]
    x = triton_cases.operands(p.shape, getattr(torch, p.dtype), device)
    out, lse = torch.empty_like(x.do), torch.empty(x.q.shape[:3], device=device)
    bad = (ids[0] == 1).to(device)
    near = bad.nonzero().flatten()
    far = torch.ones_like(bad)
    far[int(near[0]) // block * block : -(-(int(near[-1]) + 1) // block) * block] = False

    def forward(k: Tensor, v: Tensor) -> Tensor:
        attention_forward(x.q, k, v, captures, (), case.program, 0.0, None, out, lse)
        return out.clone()

    def backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
        made = [torch.empty_like(t) for t in (q, k, v)]
        none = [False, False]
        attention_backward(do, q, k, v, captures, (), case.program, 0.0, None, out, lse, none, *made, [None, None])
        return made

    q, k, v, do = (t.masked_fill(bad[:, None], math.nan) for t in (x.q, x.k, x.v, x.do))
    with few_scores(few):
        changed = [("out", forward(k, v), forward(x.k, x.v))]
        clean = backward(x.q, x.k, x.v, x.do)
        changed.append(("dq", backward(x.q, k, v, x.do)[0], clean[0]))
        changed += zip(("dk", "dv"), backward(q, x.k, x.v, do)[1:], clean[1:], strict=True)
    assert far.any()
    return [f"{what} changed" for what, after, before in changed if not torch.equal(after[:, :, far], before[:, :, far])]
