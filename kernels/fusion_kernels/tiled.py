"""The same as `reference`, a tile of scores at a time: memory linear in N, tiles that a mask hides skipped.

Runs on any device that torch does; it is what a CPU runs where ATen cannot express the program. Small problems are one tile,
so that they cost a handful of torch calls; the online softmax folds further tiles of keys in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from . import tiles
from .derivative import vjp
from .evaluate import Box, Environment, evaluate, integer, scatter
from .program import Program
from .reference import LOG2E, as_tensor, compute_dtype, dropout_factor, own_dtypes, scatter_sink, sink_over, unweighted, weighted

__all__ = ["tiled_backward", "tiled_forward"]

TILE = 2**20  # scores in a tile, unless one row of keys is longer
ROWS = 128  # rows of a query tile where tiles of keys can be skipped
KEYS = 2**14  # keys in a tile: more are folded in by the online softmax


class _Problem:
    """One call: its sizes, and how it is cut into tiles."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        captures: Sequence[torch.Tensor],
        params: Sequence[int],
        program: Program,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.captures, self.params, self.program = captures, params, program
        self.dropout_p, self.seed = dropout_p, seed
        self.dtype, self.device = compute_dtype(q.dtype), q.device
        (self.batch, self.heads, self.n, _), self.m = q.shape, k.shape[2]
        self.group = self.heads // k.shape[1]
        self.sizes = {"B": self.batch, "H": self.heads, "N": self.n, "M": self.m}
        self.bounds = tiles.kv_bounds(program)
        self.full = tiles.full_program(program)
        self.fill = tiles.fill(program)

    def blocks(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Ranges of (batch, heads) whose keys and values are held in the compute dtype at once."""
        rows = min(self.n, ROWS) if self.bounds else self.n
        room = max(1, TILE // max(1, rows * min(self.m, KEYS)))
        per_head = self.bounds is not None and any(
            node.depends_on("b", "h") for node in (self.bounds.lo, self.bounds.hi, self.bounds.full_lo, self.bounds.full_hi)
        )
        kv = self.heads // self.group
        heads = 1 if per_head and self.group == 1 else max(1, min(kv, room // self.group))
        batches = 1 if per_head or heads < kv else max(1, min(self.batch, room // self.heads))
        for b in range(0, self.batch, batches):
            for h in range(0, kv, heads):
                yield (b, min(b + batches, self.batch)), (h * self.group, min(h + heads, kv) * self.group)

    def rows(self, b: tuple[int, int], h: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Query tiles of a block."""
        room = TILE // max(1, (b[1] - b[0]) * (h[1] - h[0]) * min(self.m, KEYS))
        step = max(1, min(self.n, max(room, 16), ROWS if self.bounds else self.n))
        for start in range(0, self.n, step):
            yield start, min(start + step, self.n)

    def keys(self, box: Box, skip: bool) -> list[tuple[Box, Program]]:
        """Key tiles that the rows of `box` visit, each with the cheapest program that is right for it."""
        lo, hi, full_lo, full_hi = 0, self.m, 0, 0
        if self.bounds is not None and skip:
            corners = {"q0": box.q[0], "q1": box.q[1] - 1, "b": box.b[0]}
            ends = [
                [
                    integer(node, self.sizes, self.params, {**corners, "h": h})
                    for node in (self.bounds.lo, self.bounds.hi, self.bounds.full_lo, self.bounds.full_hi)
                ]
                for h in (range(*box.h) if self.group > 1 else box.h[:1])
            ]
            lo, hi = max(0, min(e[0] for e in ends)), min(self.m, max(e[1] for e in ends))
            full_lo, full_hi = max(e[2] for e in ends), min(e[3] for e in ends)
        tiles_: list[tuple[Box, Program]] = []
        for start in range(lo, hi, KEYS):
            end = min(start + KEYS, hi)
            program = self.full if full_lo <= start and end <= full_hi else self.program
            tiles_.append((Box(box.b, box.h, box.q, (start, end)), program))
        return tiles_

    def near(self, t: torch.Tensor) -> torch.Tensor:
        """A part of an input as the products read it: in the compute dtype, dense (once here, or in each product)."""
        return t.to(self.dtype).contiguous()

    def kv(self, t: torch.Tensor, b: tuple[int, int], h: tuple[int, int]) -> torch.Tensor:
        """The keys or values of a block, (b, kv heads, M, D), in the compute dtype."""
        return self.near(t[b[0] : b[1], h[0] // self.group : h[1] // self.group])

    def fold(self, t: torch.Tensor) -> torch.Tensor:
        """(b, h, rows, D) -> (b, kv heads, group * rows, D): the heads that share keys become more rows."""
        return t if self.group == 1 else t.unflatten(1, (-1, self.group)).flatten(2, 3)

    def unfold(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.group == 1 else t.unflatten(2, (self.group, -1)).flatten(1, 2)

    def score(self, q: torch.Tensor, k: torch.Tensor, box: Box) -> torch.Tensor:
        return self.unfold(torch.matmul(self.fold(q), k[:, :, box.k[0] : box.k[1]].mT))

    def dropout(self, env: Environment) -> torch.Tensor | None:
        return dropout_factor(env.box, self.dropout_p, self.seed, env) if self.dropout_p else None

    def sink(self, box: Box) -> torch.Tensor | None:
        """The sink's score over the rows of a box, (b, h, rows, 1) or what broadcasts to it; None for no sink."""
        if self.program.sink is None:
            return None
        rows = Box(box.b, box.h, box.q, (0, 1))
        return sink_over(self.program, Environment(rows, self.sizes, self.captures, self.params, self.dtype, self.device))

    def complete(self, m: torch.Tensor | None, z: torch.Tensor | None, nan: bool = True) -> bool:
        """Whether every row has a score far enough above the masks that nothing skipped counts (`tiles`).

        m: the rows' largest score. z: the sink's, which counts unless a row of -inf alone has to be known as such.
        nan: whether rows that are NaN (or all -inf, which become NaN) have to reach every key as well.
        """
        if m is None:
            return False
        if z is not None and self.program.zero_rows:
            m = torch.maximum(m, z)
        enough = m >= self.fill + 128
        return bool((enough & m.isfinite() if nan else enough | m.isnan()).all())

    def stopped(self, box: Box, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """`out`, (b, h, rows, Dv), with zeros for those rows of NaNs of which the weight lets none through.

        total: the sums that made it, (b, h, rows, 1): NaN in a row of NaNs, and 0 where every score is -inf.
        """
        if not self.program.selects or bool(((total > 0) & (total < math.inf)).all()):
            return out
        through = torch.zeros_like(total, dtype=torch.bool)
        for start in range(0, self.m, KEYS):
            part = Box(box.b, box.h, box.q, (start, min(start + KEYS, self.m)))
            env = Environment(part, self.sizes, self.captures, self.params, self.dtype, self.device)
            shape = (*total.shape[:3], part.k[1] - start)
            nothing = torch.full((), math.nan, dtype=self.dtype, device=self.device).expand(shape)
            through |= weighted(self.program, nothing, env).isnan().any(-1, keepdim=True)
        return out.masked_fill(~((total > 0) & (total < math.inf)) & ~through, 0.0)


@dataclass
class _Row:
    """The running softmax of a query tile: largest score, sum of exp(x - largest), and that sum over values."""

    m: torch.Tensor  # (b, h, rows, 1)
    total: torch.Tensor  # (b, h, rows, 1)
    out: torch.Tensor  # (b, h, rows, Dv), not yet divided

    def settle(self, program: Program, z: torch.Tensor | None) -> None:
        """The row once every key is in it: the sink takes its part, and a row that met nothing but -inf is what it has to be."""
        empty = self.m == -math.inf
        if z is not None:
            m = torch.maximum(self.m, z)
            m = m if program.zero_rows else m.masked_fill(empty, math.nan)
            base = m
            if program.inf_rows:  # with any finite base such a row has the sum inf, and zeros if +inf is the sink's alone
                base = torch.where(m == math.inf, self.m.masked_fill(self.m.isinf(), 0.0), m)
            decay = (self.m - base).exp_()
            self.m, self.total = m, self.total * decay + (z - base).exp_()
            self.out.mul_(decay)
        elif program.zero_rows:  # zeros rather than 0 / 0, and exp(x - inf) = 0 in the backward
            self.m, self.total = self.m.masked_fill(empty, math.inf), self.total.masked_fill(empty, 1.0)


def _scores(p: _Problem, q: torch.Tensor, k: torch.Tensor, box: Box, program: Program) -> tuple[Environment, torch.Tensor]:
    """x over a tile, (b, h, rows, keys), and the values that it was computed from."""
    env = Environment(box, p.sizes, p.captures, p.params, p.dtype, p.device, score=p.score(q, k, box))
    (x,) = evaluate([program.root], env)
    assert env.score is not None
    return env, as_tensor(x, env).expand(env.score.shape)


def _visit(p: _Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: list[tuple[Box, Program]]) -> _Row | None:
    """The softmax over the keys of `parts`, folded in one after the other; None for no keys."""
    row: _Row | None = None
    for box, program in parts:
        env, x = _scores(p, q, k, box, program)
        m = x.amax(-1, keepdim=True)
        if row is not None:
            m = torch.maximum(m, row.m)
        # rows that have met only -inf so far; and those whose lse has to become +inf, which needs exp(inf), not exp(inf - inf)
        base = m.masked_fill(m.isinf() if p.program.inf_rows else m == -math.inf, 0.0)
        e = (x - base).exp_()
        total = e.sum(-1, keepdim=True)
        keep = p.dropout(env)
        e = weighted(p.program, e if keep is None else e * keep, env)
        out = p.unfold(torch.matmul(p.fold(e), v[:, :, box.k[0] : box.k[1]]))
        if row is not None:
            decay = (row.m - base).exp_()
            total += row.total * decay
            out.addcmul_(row.out, decay)
        row = _Row(m, total, out)
    return row


@own_dtypes
def tiled_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    params: Sequence[int],
    program: Program,
    dropout_p: float,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Fills `out` (B, H, N, Dv) and `lse` (B, H, N); arguments as in `dense`. Holds one tile of scores at a time."""
    p = _Problem(q, k, v, captures, params, program, dropout_p, seed)
    if not p.m:
        out.zero_()
        lse.fill_(-math.inf)
        return
    for b, h in p.blocks():
        keys, values = p.kv(k, b, h), p.kv(v, b, h)
        for rows in p.rows(b, h):
            here = (slice(*b), slice(*h), slice(*rows))
            box, q_ = Box(b, h, rows, (0, p.m)), p.near(q[here])
            row, z = _visit(p, q_, keys, values, p.keys(box, skip=True)), p.sink(box)
            if row is None or (p.fill > -math.inf and not p.complete(row.m, z, nan=False)):
                row = _visit(p, q_, keys, values, p.keys(box, skip=False))
            assert row is not None
            row.settle(program, z)
            out[here] = p.stopped(box, row.out.div_(row.total), row.total)
            lse[here] = (row.total.log_() + row.m).squeeze(-1).mul_(LOG2E)


@own_dtypes
def tiled_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    params: Sequence[int],
    program: Program,
    dropout_p: float,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    needs: Sequence[bool],
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dcaptures: Sequence[torch.Tensor | None],
) -> None:
    """Fills `dq`, `dk`, `dv` and adds to `dcaptures` (fp32 or fp64, zeroed, one for each capture flagged in `needs`).

    The softmax is recomputed from its own maximum and sum, and delta from its own output: where a row is masked with a large
    finite fill, `lse` rounds to the fill and has forgotten how many keys share it; a 16-bit `out` would cost delta its digits.
    """
    p = _Problem(q, k, v, captures, params, program, dropout_p, seed)
    wanted = tuple(i for i, need in enumerate(needs) if need)
    for b, h in p.blocks():
        keys, values = p.kv(k, b, h), p.kv(v, b, h)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for rows in p.rows(b, h):
            here = (slice(*b), slice(*h), slice(*rows))
            box = Box(b, h, rows, (0, p.m))
            q_, do_ = p.near(q[here]), p.near(do[here])
            dq[here] = _backward_rows(p, q_, do_, keys, values, dkeys, dvalues, box, wanted, dcaptures)
        kv = (slice(*b), slice(h[0] // p.group, h[1] // p.group))
        dk[kv], dv[kv] = dkeys, dvalues


def _look(
    p: _Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, parts: list[tuple[Box, Program]], z: torch.Tensor | None
) -> tuple[tuple[Environment, torch.Tensor] | None, _Row | None]:
    """What the backward starts from: the scores, where one tile is the whole softmax; else the softmax itself."""
    if len(parts) == 1 and z is None:
        return _scores(p, q, k, *parts[0]), None
    return None, _visit(p, q, k, v, parts)


def _backward_rows(
    p: _Problem,
    q: torch.Tensor,
    do: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    box: Box,
    wanted: tuple[int, ...],
    dcaptures: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """The gradient of one query tile, (b, h, rows, D); adds to dk, dv and dcaptures."""
    parts, z = p.keys(box, skip=True), p.sink(box)
    single, row = _look(p, q, k, v, parts, z)
    if (len(parts) != 1 or parts[0][0] != box) and not p.complete(single[1].amax(-1) if single else row and row.m, z):
        parts = p.keys(box, skip=False)  # a masked or NaN row gives every key its share of the gradient
        single, row = _look(p, q, k, v, parts, z)
    if row is not None:
        row.settle(p.program, z)
    delta = None if row is None else (do * row.out).sum(-1, keepdim=True).div_(row.total)
    if p.program.inf_rows and row is not None and delta is not None:
        delta.masked_fill_(row.m == math.inf, math.nan)  # a sum over the sink as well, where +inf is the sink's alone
    dq = torch.zeros_like(q)
    if z is not None and row is not None and delta is not None and wanted:
        env = Environment(box, p.sizes, p.captures, p.params, p.dtype, p.device)
        scatter_sink(p.program, (z - row.m).exp_().div_(row.total).mul_(delta).neg_(), wanted, dcaptures, env)
    for part, program in parts:
        keys = slice(*part.k)
        env, x = single or _scores(p, q, k, part, program)
        prob = torch.softmax(x, -1) if row is None else (x - row.m).exp_().div_(row.total)
        if row is None and p.program.zero_rows:
            prob = prob.masked_fill((x == -math.inf).all(-1, keepdim=True), 0.0)
        if row is None and p.program.inf_rows:
            m = x.amax(-1, keepdim=True)
            prob = torch.where(m == math.inf, (x - m).exp_(), prob) if bool((m == math.inf).any()) else prob
        keep = p.dropout(env)
        dropped = prob if keep is None else prob * keep
        dv[:, :, keys] += torch.matmul(p.fold(weighted(p.program, dropped, env)).mT, p.fold(do))
        dp = p.unfold(torch.matmul(p.fold(do), v[:, :, keys].mT))
        dp = unweighted(p.program, dropped, dp, wanted, dcaptures, env)
        if keep is not None:
            dp.mul_(keep)
        if delta is None:
            env.grad = torch.ops.aten._softmax_backward_data(dp, prob, -1, p.dtype)  # p (dp - sum p dp), in one pass
        else:
            env.grad = prob.mul_(dp.sub_(delta))
        gradient = vjp(program, wanted)
        ds, *dloads = evaluate([gradient.dscore, *(g for _, g in gradient.loads)], env)
        for (load, _), g in zip(gradient.loads, dloads, strict=True):
            into = dcaptures[load.attr]  # type: ignore[index]
            assert into is not None
            scatter(load, as_tensor(g, env), into, env)
        if isinstance(ds, torch.Tensor):  # a number is 0: the score is not read
            ds = p.fold(ds.expand(x.shape))
            dq += p.unfold(torch.matmul(ds, k[:, :, keys]))
            dk[:, :, keys] += torch.matmul(ds.mT, p.fold(q))
    return dq
