"""Programs whose tensors hide whole keys (padding), for the Triton kernels. Runs where Triton runs: in the interpreter's process,
or on a GPU. Every function here takes and gives what can be pickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton_cases
from fusion_kernels import codegen, configs, key_ranges
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, load
from fusion_kernels.tiles import key_mask
from triton_cases import BAND, BLOCKS, CAUSAL, LOWEST, B, Case, H, K, Q, Shape

FILLS = {"-inf": -math.inf, "-1e9": -1e9, "lowest": LOWEST}
STRUCTURES = {"none": None, "causal": CAUSAL, "window": BAND, "blocks": BLOCKS}


@dataclass(frozen=True)
class Padded:
    """kinds: one of "all", "none", "right", "left", "middle", "holes" for each batch (or head, or both, as `by` has it)."""

    n: int
    m: int
    kinds: tuple[str, ...]
    by: str = "b"  # what the mask is read at beside k: "b", "h", "bh"; "length": k < length[b]; "ints": ids[b, k] != 0
    structure: str = "none"
    fill: str = "-inf"
    form: str = "where"  # or "nested": a where each; "added": a mask of 0 and the fill
    bias: str = ""  # "keys": [H, M]; "table": [H, N, M]; "own": [B, H, N, M]
    zero_rows: bool = False
    dropout: float = 0.0
    dtype: str = "float32"
    heads: int = 1
    kv_heads: int = 1
    d: int = 16
    seed: int = 0

    @property
    def shape(self) -> Shape:
        return Shape(2, self.heads, self.kv_heads, self.n, self.m, self.d, self.d)


def alive(kind: str, m: int) -> torch.Tensor:
    """(M,) bool: the keys that are alive."""
    keep = torch.ones(m, dtype=torch.bool)
    cut = int(torch.randint(0, m + 1, ()))
    if kind == "none":
        keep[:] = False
    if kind in ("right", "middle"):
        keep[m - cut // (1 + (kind == "middle")) :] = False
    if kind in ("left", "middle"):
        keep[: cut // (1 + (kind == "middle"))] = False
    if kind == "holes":
        keep = torch.rand(m) < torch.rand(())
    return keep


def masks(p: Padded) -> torch.Tensor:
    """(2, heads, M) bool: the keys that are alive for each batch and head."""
    kinds = iter(p.kinds * (2 * p.heads))
    if p.by == "h":
        return torch.stack([alive(next(kinds), p.m) for _ in range(p.heads)]).expand(2, -1, -1)
    if p.by == "bh":
        return torch.stack([alive(next(kinds), p.m) for _ in range(2 * p.heads)]).view(2, p.heads, p.m)
    return torch.stack([alive(next(kinds), p.m) for _ in range(2)])[:, None].expand(-1, p.heads, -1)


def _mask(p: Padded, keep: torch.Tensor) -> tuple[Node, Capture, torch.Tensor]:
    """The predicate that a key is alive, and what it captures."""
    match p.by:
        case "h":
            return load(0, "bool", [H, K]), Capture("bool", 2), keep[0].clone()
        case "bh":
            return load(0, "bool", [B, H, K]), Capture("bool", 3), keep.clone()
        case "length":  # for kinds "all", "none" and "right"
            return apply("lt", K, load(0, "int", [B])), Capture("int", 1), keep[:, 0].sum(-1)
        case "ints":
            return apply("ne", load(0, "int", [B, K]), const(0)), Capture("int", 2), keep[:, 0].long() * 7
    return load(0, "bool", [B, const(0), const(0), K]), Capture("bool", 4), keep[:, :1, None].clone()


_BIASES = {"keys": [H, K], "table": [H, Q, K], "own": [B, H, Q, K]}


def case_of(p: Padded) -> tuple[Case, torch.Tensor]:
    """The program with its tensors, and the keys that its mask leaves alive, (2, heads, M)."""
    torch.manual_seed(p.seed)
    keep = masks(p)
    mask, kind, tensor = _mask(p, keep)
    x = apply("mul", SCORE, const(p.d**-0.5))
    captures, tensors = [kind], [tensor]
    if p.bias:
        indices = _BIASES[p.bias]
        sizes = {B: 2, H: p.heads, Q: p.n, K: p.m}
        x = apply("add", x, load(1, "float", indices))
        captures.append(Capture("float", len(indices)))
        tensors.append(torch.randn(*(sizes[i] for i in indices)))
    structure, fill = STRUCTURES[p.structure], const(FILLS[p.fill])
    if p.form == "nested":
        x = apply("where", apply("not", mask), fill, x)
        x = x if structure is None else apply("where", structure, x, fill)
    else:
        both = mask if structure is None else apply("and", structure, mask)
        added = apply("add", x, apply("where", both, const(0.0), fill))
        x = added if p.form == "added" else apply("where", both, x, fill)
    return Case(Program(x, tuple(captures), 0, p.zero_rows), tensors), keep


@contextmanager
def few_scores(number: int) -> Iterator[None]:
    """Calls inside ask what tensors hide from so many scores on, keys or pairs, however few heads share a mask."""
    before = configs.asking()
    configs.FEW_SCORES = configs.FEW_PAIR_SCORES = number
    configs.PAIR_SHARERS = 1
    try:
        yield
    finally:
        configs.FEW_SCORES, configs.FEW_PAIR_SCORES, configs.PAIR_SHARERS = before


def compare(p: Padded, device: str = "cpu") -> list[str]:
    """What is wrong with the kernels' results, a line each."""
    case, _ = case_of(p)
    dtype = getattr(torch, p.dtype)
    assert key_mask(case.program) is not None
    x = triton_cases.operands(p.shape, dtype, device)
    captures = [c.to(device, dtype) if c.is_floating_point() else c.to(device) for c in case.captures]
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


def poisoned(p: Padded, device: str = "cpu", block: int = 64) -> list[str]:
    """With NaN in every key and value of the tiles, of at most `block`, that have no live key: what changed, a line each."""
    case, keep = case_of(p)
    x = triton_cases.operands(p.shape, getattr(torch, p.dtype), device)
    captures = [c.to(device) for c in case.captures]
    with few_scores(1):
        clean = triton_cases.fused(x, case, captures)
        hidden = 0
        for b in range(2):
            live = keep[b].any(0).nonzero().flatten()
            lo, hi = int(live[0]) // block * block, -(-(int(live[-1]) + 1) // block) * block
            for t in (x.k, x.v):
                t[b, :, :lo] = math.nan
                t[b, :, hi:] = math.nan
            hidden += lo + max(0, p.m - hi)
        after = triton_cases.fused(x, case, captures)
    changed = [what for what, o, n in zip(triton_cases.OUTPUTS, clean, after, strict=False) if not torch.equal(o, n)]
    return [f"{what} changed" for what in changed] if hidden else ["no tile is hidden"]


def ranges(p: Padded, block: int) -> tuple[list[list[int]], list[list[int]]]:
    """(found, expected) ranges of every batch and head, keys looked at `block` at a time."""
    key_ranges._BLOCK = block
    case, keep = case_of(p)
    asked = key_ranges.KeyRanges(case.program, codegen.key_mask(case.program), (2, p.heads, p.n, p.m))
    *_, found, b_stride, h_stride = asked(codegen.aux_arguments(case.program, case.captures, ()), torch.device("cpu"))
    flat = found.flatten().tolist()
    rows = [(b, h) for b in range(2) for h in range(p.heads)]
    return [flat[b * b_stride + h * h_stride :][:4] for b, h in rows], [_runs(keep[b, h].tolist()) for b, h in rows]


def does_not_ask(p: Padded) -> list[str]:
    """A poisoned key reaches the output of a call with fewer scores than `configs.FEW_SCORES`."""
    case, keep = case_of(p)
    x = triton_cases.operands(p.shape, getattr(torch, p.dtype), "cpu")
    x.v[~keep.any(1, keepdim=True).expand(-1, p.kv_heads, -1)] = math.nan
    with few_scores(2**62):
        out = triton_cases.fused(x, case, case.captures)[0]
    return [] if out.isnan().any() else ["hidden keys were not read"]


def _runs(keep: list[bool]) -> list[int]:
    if not any(keep):
        return [0, 0, 0, 0]
    lo, hi = keep.index(True), len(keep) - keep[::-1].index(True)
    early = next((i for i in range(lo, hi) if not keep[i]), hi)
    late = next((i + 1 for i in range(hi - 1, lo - 1, -1) if not keep[i]), lo)
    return [lo, hi, lo, early] if early - lo >= hi - late else [lo, hi, late, hi]
