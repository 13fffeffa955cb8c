"""A strategy that writes score programs, straight for the kernels: masks, biases and functions composed, with their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from fusion_kernels.program import SCORE, Capture, Node, Program, apply, const, index, load, param
from hypothesis import strategies as st

from fuzz.decisions import Decisions, decisions
from fuzz.inputs import Input

__all__ = ["Scored", "scores"]

AXES = ("b", "h", "q", "k")
INTERPRETED = ((1, 2, 3, 7, 16, 17, 33, 40), (1, 8, 16, 24, 32), ("float32", "float32", "float16"))
ON_DEVICE = ((1, 2, 17, 63, 64, 65, 127, 128, 129, 197, 300), (1, 8, 16, 40, 64, 72, 128), ("bfloat16", "float32", "float16"))


@dataclass(frozen=True)
class Scored:
    """A score program and what it runs on. shape: (B, H, Hkv, N, M, D, Dv)."""

    text: str
    shape: tuple[int, ...]
    captures: tuple[Input, ...]
    params: tuple[int, ...]
    dtype: str
    dropout: float
    transposed: bool
    seed: int
    poison: float | None

    def __repr__(self) -> str:
        inputs = "".join(f"    {x!r}\n" for x in self.captures)
        return (
            f"\n{self.text}\n{inputs}shape={self.shape} params={self.params} dtype={self.dtype} dropout={self.dropout} "
            f"transposed={self.transposed} seed={self.seed} poison={self.poison}\n"
        )


def op(name: str, *args: Node | float) -> Node:
    return apply(name, *(a if isinstance(a, Node) else const(a) for a in args))


Q, K, B, H = index("q"), index("k"), index("b"), index("h")


class ScoreWriter(Decisions):
    """Draws one program."""

    def __init__(self, source: bytes, interpreted: bool) -> None:
        super().__init__(source)
        lengths, dims, dtypes = INTERPRETED if interpreted else ON_DEVICE
        self.dtype = self.pick(*dtypes)
        b, hkv, group = self.pick(1, 2), self.pick(1, 2), self.pick(1, 1, 2, 3)
        n, d = self.pick(*lengths), self.pick(*dims)
        m = n if self.chance(40) else self.pick(*lengths)
        self.shape = (b, hkv * group, hkv, n, m, d, d if self.chance(60) else self.pick(*dims))
        self.sizes = dict(zip(AXES, (b, hkv * group, n, m)))
        self.inputs: list[Input] = []
        self.params: list[int] = []
        self.structural = False

    # ------------------------------------------------------------ leaves

    def read(self, kind: str, **options: Any) -> Node:
        """An element of a new tensor, whose dims are some of the axes, some of size 1, in this order."""
        axes = [a for a in AXES if self.chance(70)]
        whole = [self.chance(75) for _ in axes]
        shape = [self.sizes[a] if w else 1 for a, w in zip(axes, whole)]
        node_kind = {"keep": "bool", "ids": "int"}.get(kind, "float")
        dtype = {"keep": torch.bool, "ids": torch.int64}.get(kind)
        at = [index(a) if w else const(0) for a, w in zip(axes, whole)]
        if at and axes[-1] == "k" and whole[-1] and self.chance(15):
            at[-1] = op("sub", self.sizes["k"] - 1, K)  # read from the end
        return self.tensor(node_kind, at, shape, kind=kind, dtype=dtype, **options)

    def tensor(self, node_kind: str, at: list[Node], shape: list[int], **options: Any) -> Node:
        order = self.shuffled(len(shape)) if len(shape) > 1 and self.chance(20) else None
        self.inputs.append(Input(f"c{len(self.inputs)}", tuple(shape), order=order, **options))
        return load(len(self.inputs) - 1, node_kind, at)

    def uniform(self) -> Node:
        """An integer that is one for the whole problem, or for a head."""
        if self.chance(30):
            self.params.append(self.pick(0, 1, 5, 30))
            return param(len(self.params) - 1)
        return self.pick(const(0), const(1), const(7), const(-3), op("sub", index_size("M"), index_size("N")), H)

    # ------------------------------------------------------------ predicates

    def position(self) -> Node:
        self.structural = True
        c, width = self.uniform(), self.pick(1, 2, 5, 16, 20)
        forms = [
            op("le", K, Q), op("le", K, op("add", Q, c)), op("lt", op("abs", op("sub", Q, K)), width),
            op("eq", op("floordiv", Q, width), op("floordiv", K, width)), op("lt", K, c), op("ge", Q, c),
            op("and", op("le", K, Q), op("gt", K, op("sub", Q, width))), op("gt", op("add", Q, K), c),
            op("or", op("le", K, Q), op("lt", K, width)), op("ne", Q, K), op("eq", op("mod", K, width), 0),
            op("lt", K, Q), op("le", op("floordiv", op("sub", Q, K), width), c),
        ]  # fmt: skip
        return self.pick(*forms)

    def atom(self) -> Node:
        if self.chance(50):
            return self.position()
        if self.chance(25):
            shape = (self.sizes["b"], max(self.sizes["q"], self.sizes["k"]))
            row = self.tensor("int", [B, Q], list(shape), kind="ids")
            return op("eq", row, load(len(self.inputs) - 1, "int", [B, K]))
        return self.read("keep", dead=self.chance(20))

    def predicate(self) -> Node:
        p = self.atom()
        while self.chance(35):
            p = op(self.pick("and", "and", "or", "xor"), p, self.atom())
        return op("not", p) if self.chance(20) else p

    # ------------------------------------------------------------ functions

    def fill(self) -> float:
        wide = (-1e9, torch.finfo(torch.float32).min) if self.dtype != "float16" else (-3e4,)
        return self.pick(-math.inf, -math.inf, -1e4, *wide)

    def step(self, x: Node) -> Node:
        kind = self.pick("mask", "mask", "mask", "bias", "added", "factor", "softcap", "alibi", "table", "clamp", "function")
        return getattr(self, f"_{kind}")(x)

    def _mask(self, x: Node) -> Node:
        p, fill = self.predicate(), self.fill()
        form = self.pick("where", "turned", "added", "one minus")
        if form == "where":
            return op("where", p, x, fill)
        if form == "turned":
            return op("where", op("not", p), fill, x)
        if form == "added":
            return op("add", x, op("where", p, 0.0, fill))
        return op("add", x, op("mul", op("sub", 1.0, op("to_float", p)), fill if math.isfinite(fill) else -1e4))

    def _bias(self, x: Node) -> Node:
        return op("add", x, self.read("normal"))

    def _added(self, x: Node) -> Node:
        return op("add", x, self.read("additive", fill=self.fill(), dead=self.chance(20)))

    def _factor(self, x: Node) -> Node:
        return op("mul", x, self.read("normal"))

    def _softcap(self, x: Node) -> Node:
        return op("mul", op("tanh", op("div", x, 5.0)), 5.0)

    def _alibi(self, x: Node) -> Node:
        slope = self.tensor("float", [H], [self.sizes["h"]], scale=0.1)
        return op("add", x, op("mul", slope, op("to_float", op("sub", K, Q))))

    def _table(self, x: Node) -> Node:
        reach = max(self.sizes["q"], self.sizes["k"])
        at = op("add", op("sub", Q, K), reach)
        return op("add", x, self.tensor("float", [at, H], [2 * reach + 1, self.sizes["h"]]))

    def _clamp(self, x: Node) -> Node:
        return op("where", op("lt", x, -1.5), -1.5, x)

    def _function(self, x: Node) -> Node:
        forms = [op("sigmoid", x), op("mul", x, op("sigmoid", x)), op("abs", x), op("sin", x), op("neg", x), op("erf", x),
                 op("maximum", x, 0.3), op("log1p", op("exp", op("minimum", x, 5.0)))]  # fmt: skip
        return self.pick(*forms)


def index_size(name: str) -> Node:
    return Node.make("size", attr=name)


def write(source: bytes, interpreted: bool) -> Scored:
    """The program of these decisions."""
    w = ScoreWriter(source, interpreted)
    x = op("mul", SCORE, w.pick(w.shape[5] ** -0.5, 1.0, 0.125, -0.3))
    for _ in range(w.pick(0, 1, 1, 2, 3)):
        x = w.step(x)
    ranks = tuple(Capture(_kind(i), len(i.shape)) for i in w.inputs)
    dropout = w.pick(0.1, 0.5) if w.chance(15) else 0.0
    poison, inf_rows = None, False
    if w.chance(8):  # in q, or in what is added to the score: never in a key that positions alone hide
        value = w.pick(math.nan, math.inf, -math.inf)
        floats = [i for i, c in enumerate(w.inputs) if c.kind == "normal" and not w.structural]
        if floats and w.chance(50):
            which = w.pick(*floats)
            w.inputs[which] = replace(w.inputs[which], poison=value)
        else:
            poison = value
        inf_rows = w.chance(50)
    program = Program(x, ranks, len(w.params), inf_rows=inf_rows)
    return Scored(
        program.text, w.shape, tuple(w.inputs), tuple(w.params), w.dtype, dropout, w.chance(60), w.pick(*range(256)), poison
    )


def _kind(x: Input) -> str:
    return {"keep": "bool", "ids": "int"}.get(x.kind, "float")


def scores(*, interpreted: bool) -> st.SearchStrategy[Scored]:
    """Score programs with shapes, dtypes and tensors; `interpreted`: small, and without bf16, as the interpreter needs it."""
    return decisions(100).map(lambda source: write(source, interpreted))
