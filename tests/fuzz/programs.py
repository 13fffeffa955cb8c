"""A Hypothesis strategy that writes attention programs: real source, one spelling drawn for every decision in it.

A program is written in the order in which a model computes: how q, k and v come in, where the scale sits, the product, masks and
score functions one after the other, the softmax, dropout, the second product, and what becomes of the output. Each decision is
a draw; the text is what is compiled, and what is printed when a test fails: `Written.script` runs alone.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st

from fuzz.around import AroundWriter
from fuzz.decisions import decisions
from fuzz.inputs import Input, make
from fuzz.masks import MaskWriter
from fuzz.operands import LENGTHS, OperandWriter

__all__ = ["Written", "programs"]

# True where the backward of a function reads what the function gave (tanh' = 1 - tanh^2): torch refuses to run that backward once
# the scores were edited in place.
POINTWISE: Mapping[str, bool] = {
    "torch.sigmoid(s)": True,
    "s.abs()": False,
    "torch.tanh(s)": True,
    "F.gelu(s)": False,
    "F.silu(s)": False,
    "-s": False,
    "s * s * 0.25": False,
    "F.softplus(s)": False,
    "F.leaky_relu(s, 0.1)": False,
    "torch.sin(s)": False,
    "F.relu(s)": True,
    "s.square() * 0.1": False,
}
# How the lines start that make the probabilities of the scores; others that start with "p = " change them.
MADE = (
    "F.softmax",
    "s.softmax",
    "torch.softmax",
    "torch.nn.Softmax",
    "torch.exp",
    "F.log_softmax",
    "e /",
    "p.to(v.d",
    "p.type_as",
)
CASTS = ("s.float()", "s.to(torch.float32)")  # give s itself where it is fp32 already


@dataclass(frozen=True)
class Written:
    """A program and how to run it.

    fused: whether the pass has to fuse it; None where either is right. dropout: its rate; 0 for none. sites: its attentions.
    second: inputs of other lengths, for what the first inputs have compiled; empty for a program of static shapes.
    """

    source: str
    inputs: tuple[Input, ...]
    dtype: torch.dtype
    fused: bool | None
    dynamic: bool
    inner: str
    seed: int
    dropout: float
    second: tuple[Input, ...] = ()
    sites: int = 1

    @property
    def uncancelled(self) -> Written:
        """The program with a constant sum under the softmax: its gradients are the terms that cancel in those of the program."""
        lines = self.source.splitlines()
        softmax = [
            i
            for i, x in enumerate(lines)
            if x.lstrip().startswith("e = ") or any(x.lstrip().startswith("p = " + y) for y in MADE)
        ]
        if not softmax:
            return self
        margin = " " * (len(lines[softmax[0]]) - len(lines[softmax[0]].lstrip()))
        lines[softmax[0]] = f"{margin}p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True).detach()).to(v.dtype)"
        return replace(self, source="\n".join(x for i, x in enumerate(lines) if i not in softmax[1:]) + "\n")

    def build(self, **names: Any) -> Callable[..., Any]:
        """The function that the source defines; `names` replaces what it imports (``F``)."""
        file = f"<fuzz {abs(hash(self.source)):x}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)
        space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, **names}
        exec(compile(self.source, file, "exec"), space)
        return space["attention"]

    def make(self, seed: int | None = None) -> list[torch.Tensor]:
        return make(self.inputs, self.dtype, self.seed if seed is None else seed)

    @property
    def script(self) -> str:
        """Python that runs the check on this program alone, from the folder of the tests."""
        return (
            "import torch\nfrom math import inf, nan\nfrom fuzz.inputs import Input\nfrom fuzz.judge import check\n"
            f'from fuzz.programs import Written\n\nSOURCE = """\n{self.source}"""\n'
            f"INPUTS = {_shown(self.inputs)}\nSECOND = {_shown(self.second)}\n"
            f"check(Written(SOURCE, INPUTS, {self.dtype}, fused={self.fused}, dynamic={self.dynamic}, "
            f"inner={self.inner!r}, seed={self.seed}, dropout={self.dropout}, second=SECOND, "
            f"sites={self.sites}))\n"
        )

    def __repr__(self) -> str:
        return "\n" + self.script


def _shown(inputs: tuple[Input, ...]) -> str:
    given = [[f"{f.name}={getattr(x, f.name)!r}" for f in fields(x) if f.default != getattr(x, f.name)] for x in inputs]
    return "(\n" + "".join(f"    Input({', '.join(x)}),\n" for x in given) + ")"


class Writer(OperandWriter):
    """Draws and writes one program. Methods are called in the order of the program."""

    def __init__(self, source: bytes, lengths: tuple[int, int] | None = None) -> None:
        super().__init__(source, lengths)
        self.dtype: torch.dtype = self.pick(*[torch.float32] * 6, *[torch.bfloat16] * 3, torch.float16, torch.float64)
        self.autocast = self.dtype == torch.float32 and self.chance(20)
        self.low = torch.bfloat16 if self.autocast else self.dtype  # of the products
        self.half = self.low in (torch.bfloat16, torch.float16)
        self.unshifted = False  # a softmax by hand that no row's maximum is taken from
        self.wide = False  # scores of a half-precision program that have become fp32
        self.dynamic = self.chance(12)  # four times the time of a static one
        self.s = self._sizes()
        self.masks, self.around = MaskWriter(self), AroundWriter(self)

    # ------------------------------------------------------------ the scores

    def scores(self) -> None:
        s, after = self.s, ""
        place = self.pick("scores", "query", "key", "both", "none", "divide", "shape", "tensor", "heads", "alpha")
        value = self.pick(0.125, 0.5, 1.0, -0.3)
        if place == "query":
            self.line(self.pick(f"q = q * {value}", f"q = {value} * q", f"q = q / {1 / value!r}"))
        elif place == "key":
            self.line(f"k = k * {value}")
        elif place == "both":
            self.line(self.pick("q, k = q * d**-0.25, k * d**-0.25", f"q, k = q / {s.d}**0.25, k / {s.d}**0.25"))
        elif place == "scores":
            after = self.pick(
                f"s = s * {value}", f"s = {value} * s", f"s *= {value}", f"s = s.mul({value})", f"s = torch.mul(s, {value})"
            )
        elif place == "divide":
            after = self.pick(f"s = s / {1 / value!r}", f"s = s.div({1 / value!r})", f"s /= {1 / value!r}")
        elif place == "shape":
            after = self.pick("s = s / d**0.5", "s = s * d**-0.5", "s = s * (1.0 / d**0.5)")
        elif place == "tensor":
            x = self.input("scale", *self.pick((), (1,)), scale=0.5, dtype=self.dtype)
            after = f"s = s * {x}"
        elif place == "heads" and s.lead:
            x = self.input("scale", s.lead[-1], 1, 1, scale=0.5)
            after = f"s = s * {x}"
        three = len(s.lead) == 1
        if place == "alpha" and three:
            self._baddbmm(value)
        else:
            forms = ["q @ k.mT", "torch.matmul(q, k.transpose(-2, -1))", "q.matmul(k.transpose(-1, -2))",
                     "torch.einsum('...qd,...kd->...qk', q, k)", "(k @ q.mT).mT", "q @ k.movedim(-1, -2)"]  # fmt: skip
            forms += ["torch.bmm(q, k.transpose(1, 2))"] * 2 * three
            forms += (
                ["torch.einsum('bhid,bhjd->bhij', q, k)"] * 2 * (len(s.lead) == 2 and s.lead == (s.b, s.h) and self._same_heads())
            )
            self.line(f"s = {self.pick(*forms)}")
        if after:
            self.line(after)

    def folds(self) -> bool:
        """Whether torch itself leaves no product to find.

        einsum over a dim of size 1 is a multiplication, and at a single position a mask of positions is a number.
        """
        if self.masks.structural and self.s.n == self.s.m == 1:
            return True
        return min(self.s.d, self.s.m) == 1 and any("einsum" in x for x in self.lines)

    def _same_heads(self) -> bool:
        return self.s.h == self.s.hkv

    def _baddbmm(self, value: float) -> None:
        s = self.s
        if self.chance(50):
            empty = f"torch.empty({s.lead[0]}, n, m, dtype=q.dtype)"
            self.line(f"s = torch.baddbmm({empty}, q, k.transpose(1, 2), beta=0, alpha={value})")
        else:
            bias = self.input("bias", self.pick(1, s.lead[0]), self.pick(1, s.n), s.m, scale=0.5)
            self.line(f"s = torch.baddbmm({bias}, q, k.transpose(1, 2), beta={self.pick(1, 0.5)}, alpha={value})")

    @property
    def editable(self) -> bool:
        """Whether the scores so far may be edited in place: not where the backward of the function that gave them reads them."""
        made = [x.removeprefix("s = ") for x in self.lines if x.startswith("s = ")]
        return not POINTWISE.get([x for x in made if x not in CASTS][-1], False)

    def functions(self) -> None:
        """Masks and pointwise functions, up to three of them, in any order."""
        for _ in range(self.pick(0, 1, 1, 2, 3)):
            kind = self.pick("mask", "mask", "mask", "bias", "factor", "softcap", "alibi", "table", "clamp", "pointwise", "float")
            getattr(self, f"_do_{kind}")()

    def _do_mask(self) -> None:
        self.masks.mask()

    def broadcast(self, *, rows: bool = True) -> tuple[int, ...]:
        """A shape that broadcasts to the scores: each dim whole or 1, leading ones perhaps left away."""
        shape = [x if self.chance(50) else 1 for x in (*self.s.lead, self.s.n, self.s.m)]
        if not rows:
            shape[-2] = 1
        shape[-1] = self.s.m if self.chance(80) else shape[-1]
        while len(shape) > 1 and shape[0] == 1 and self.chance(50):
            shape = shape[1:]
        return tuple(shape)

    def float_input(self, name: str, *shape: int, **options: Any) -> str:
        """A float tensor for the scores, at times wider than they are: what is made of it and of them is as wide."""
        wide = self.half and self.chance(25)
        self.wide |= wide
        return self.input(name, *shape, dtype=torch.float32 if wide else None, **options)

    def _do_bias(self) -> None:
        bias = self.float_input("bias", *self.broadcast())
        self.line(self.pick(f"s = s + {bias}", f"s = {bias} + s", f"s = torch.add(s, {bias}, alpha=0.5)", f"s = s - {bias}"))

    def _do_factor(self) -> None:
        factor = self.float_input("factor", *self.broadcast())
        self.line(self.pick(f"s = s * {factor}", f"s = {factor} * s"))

    def _do_softcap(self) -> None:
        cap = self.pick(2.0, 5.0, 30.0)
        self.line(f"s = {cap} * torch.tanh(s / {cap})")

    def _do_alibi(self) -> None:
        heads = self.s.lead[-1:]
        slopes = self.float_input("slopes", *heads, *((1, 1) if heads else ()), scale=0.1)
        self.line(f"s = s + {slopes} * ({self.masks.columns()} - {self.masks.rows()})")

    def _do_table(self) -> None:
        """T5: a learned table, read at the distance of query and key."""
        heads = self.s.lead[-1] if self.s.lead else 1
        table = self.input("table", 2 * max(self.s.n, self.s.m), heads)
        distance = f"({self.masks.columns()} - {self.masks.rows()} + max(n, m))"
        self.line(f"relative = {table}[{distance}].permute(2, 0, 1)" + ("" if self.s.lead else "[0]"))
        self.line("s = s + relative")

    def _do_clamp(self) -> None:
        self.line(self.pick("s = s.clamp(-2.0, 3.0)", "s = s.clamp(min=-1.5)", "s = torch.clamp(s, max=2.5)"))

    def _do_pointwise(self) -> None:
        self.line(f"s = {self.pick(*POINTWISE)}")

    def _do_float(self) -> None:
        if self.half:
            self.line(f"s = {self.pick(*CASTS)}")
            self.wide = True

    # ------------------------------------------------------------ softmax, dropout, values

    def softmax(self, dim: int = -1) -> None:
        dim = dim if self.chance(50) else len(self.s.lead) + 2 + dim
        forms = [f"F.softmax(s, dim={dim})", f"s.softmax({dim})", f"torch.softmax(s, {dim})", f"torch.nn.Softmax(dim={dim})(s)"]
        if self.half:
            forms += [f"F.softmax(s, dim={dim}, dtype=torch.float32)", f"torch.softmax(s.float(), {dim})"]
        form = self.pick(*forms, "hand") if self.chance(60) else forms[0]
        self.wide |= "float" in form
        if form != "hand":
            self.line(f"p = {form}")
        else:
            self._softmax_by_hand(dim)
        if self.wide and self.half and not self.autocast:
            self.line("p = p." + self.pick("to(v.dtype)", "type_as(v)"))
        elif self.chance(10):
            self.line("p = p.to(v.dtype)")

    def _softmax_by_hand(self, dim: int) -> None:
        top = self.pick(
            f"s.amax({dim}, keepdim=True)", f"s.max(dim={dim}, keepdim=True).values", f"s.max({dim}, keepdim=True)[0].detach()"
        )
        if self.chance(20) and not self.masks.absorbing:  # of a row that is hidden whole, eager's own rounding gives the sum
            self.unshifted = True
            self.line(f"p = torch.exp(s - torch.logsumexp(s, {dim}, keepdim=True))")
        elif self.chance(20):
            self.line(f"p = F.log_softmax(s, {dim}).exp()")
        else:
            self.line(f"e = torch.exp(s - {top})")
            self.line(f"p = e / e.sum({dim}, keepdim=True)")

    def dropout(self) -> float:
        if not self.chance(15):
            if self.chance(10):
                self.line("p = F.dropout(p, 0.3, training=False)")
            return 0.0
        if self.broadcast_heads > self.s.n:
            return 0.0  # of rows folded so, the op takes the longer axis for the queries: its bits are counted along the heads
        rate = self.pick(0.1, 0.5, 0.9)
        self.line(f"p = F.dropout(p, {rate})")
        return rate

    def values(self) -> None:
        self.line(f"out = {self.pick(*self._products('p', 'v'))}")

    def _products(self, p: str, v: str) -> list[str]:
        forms = [
            f"{p} @ {v}",
            f"torch.matmul({p}, {v})",
            f"torch.einsum('...qk,...kd->...qd', {p}, {v})",
            f"({v}.mT @ {p}.mT).mT",
        ]
        return forms + [f"torch.bmm({p}, {v})"] * 2 * (len(self.s.lead) == 1)

    def company(self, alike: bool) -> list[str]:
        """A second attention, which shares the probabilities or, if not `alike`, the scores; no lines for a program without."""
        if not self.chance(15):
            return []
        if alike or self.chance(50):
            lines, p = [], "p"
        else:
            lines, p = [f"r = torch.softmax({self.pick('s', 's * 0.5', '-s')}, -1).to(v.dtype)"], "r"
        u = self.pick("v", "u")
        return [
            *lines,
            *([f"u = v[..., :{(self.s.dv + 1) // 2}] * 2"] if u == "u" else []),
            f"more = {self.pick(*self._products(p, u))}",
        ]

    def output(self) -> None:
        s = self.s
        form = self.pick("as is", "merge", "gain", "float")
        if form == "merge" and len(s.lead) == 2:
            self.line(
                f"out = out.transpose(1, 2).{self.pick('reshape', 'contiguous().view')}({s.lead[0]}, -1, {s.lead[1] * s.dv})"
            )
        elif form == "merge" and len(s.lead) == 1:
            self.line(f"out = out.reshape({s.lead[0]}, -1).sum(0)")
        elif form == "gain":
            self.line("out = out * 2 + 1")
        elif form == "float":
            self.line("out = out.float()")

    def library(self) -> None:
        """torch's own attention in place of product, mask, softmax and product."""
        form = self.pick("none", "causal", "bool", "bias", "both")
        given = {"causal": ["is_causal=True"], "none": []}.get(form, ["attn_mask=bias_"])
        self.masks.structural |= form == "causal"
        if form in ("bool", "both"):
            self.line(f"keep_ = {self.masks.predicate()}")
        if form == "bool":
            given = [self.pick("attn_mask=keep_", "attn_mask=keep_.expand(*q.shape[:-1], m)")]
        elif form == "bias":
            shape = self.broadcast()
            self.line(f"bias_ = {self.input('bias', *[1] * (2 - len(shape)), *shape)}.to(q.dtype)")
        elif form == "both":
            bias = self.input("bias", *self.broadcast())
            fill = self.pick("float('-inf')", f"torch.finfo({self.low}).min")
            self.line(f"bias_ = torch.where(keep_, {bias}, {fill}).to(q.dtype)")
        if self.chance(40):
            given.append(f"scale={self.pick(0.5, 0.125, 1.0)}")
        self.line(f"out = F.scaled_dot_product_attention({', '.join(['q, k, v', *given])})")

    # ------------------------------------------------------------ spoiled programs

    def spoil(self) -> str:
        """Name of the edit that forbids fusing; it is written by `write` where it belongs."""
        return self.pick("return p", "return s", "edit", "dim", "row", "sum of p")


SPOILED: Mapping[str, tuple[str, str, str]] = {  # before the softmax, after it, what is returned
    "return p": ("", "", "out, p"),
    "return s": ("", "", "out, s"),
    "edit": ("", "p = p * 0.5 + 0.125", "out"),
    "dim": ("", "", "out"),
    "row": ("s = s - s.mean(-1, keepdim=True)", "", "out"),
    "sum of p": ("", "", "out, p.float().square().sum()"),
}


AUTOCAST = "with torch.autocast('cpu', dtype=torch.bfloat16):"


def write(source: bytes) -> Written:
    """The program of these decisions; one of dynamic shapes with inputs of two lengths."""
    w, program = _write(source, None)
    n, m = w.s.n, w.s.m
    if not program.dynamic or min(n, m) == 1:  # a length of 1 is compiled for itself
        return program
    others = [x for x in LENGTHS if x not in (1, n, m)]
    first = w.pick(*others)
    lengths = (first, first) if n == m else (first, w.pick(*(x for x in others if x != first)))
    again = _write(source, lengths)[1]
    same = (again.source, again.fused) == (program.source, program.fused)
    same &= [(x.name, len(x.shape)) for x in again.inputs] == [(x.name, len(x.shape)) for x in program.inputs]
    return replace(program, second=again.inputs) if same else program


def _write(source: bytes, lengths: tuple[int, int] | None) -> tuple[Writer, Written]:
    w = Writer(source, lengths)
    region = w.pick(0, 1) if w.autocast else 0  # whether how q, k and v come in is outside of autocast
    w.operands()
    start = region * len(w.lines)
    if w.chance(6) and w.s.lead:
        w.library()
        return w, _finished(w, "out", None, 1, 0.0, start)
    w.scores()
    w.functions()
    spoiled = w.spoil() if w.chance(8) else ""
    before, after, returned = SPOILED.get(spoiled, ("", "", "out"))
    if before:
        w.line(before)
    leave_out = "" if spoiled else w.around.column()
    w.softmax(-2 if spoiled == "dim" else -1)
    if leave_out:
        w.line(leave_out)
    if after:
        w.line(after)
    difference = not spoiled and not leave_out and w.around.difference()
    softmaxed = len(w.lines)
    if not spoiled:
        w.around.weight()
    weighted = len(w.lines) > softmaxed
    dropout = 0.0 if spoiled else w.dropout()
    if not spoiled and not weighted:
        w.around.weight()
        weighted = len(w.lines) > softmaxed
    w.values()
    company = [] if difference else w.company(bool(dropout or leave_out))
    for line in company:
        w.line(line)
    by_hand = any(x.startswith("e = ") for x in w.lines)
    either = min(w.s.n, w.s.m) == 1 and spoiled or w.folds() or (w.unshifted and weighted) or (w.s.m == 1 and by_hand)
    fused = None if either else not spoiled
    returned += ", more" if company else ""
    # what is not finite in a value is infinity less infinity where two softmaxes are subtracted
    return w, _finished(w, returned, fused, 2 if company or difference else 1, dropout, start, poison=not (spoiled or difference))


def _finished(
    w: Writer, returned: str, fused: bool | None, sites: int, dropout: float, start: int, *, poison: bool = True
) -> Written:
    """The program of what is written; under autocast from the line `start` on."""
    if w.autocast:
        w.lines[start:] = [AUTOCAST, *(f"    {x}" for x in w.lines[start:])]
    w.output()
    if poison:
        w.masks.poison()
    if not any(x.grad for x in w.inputs) and w.chance(70):
        w.inputs[0] = replace(w.inputs[0], grad=True)
    inner, seed = "aot_eager" if w.chance(12) else "eager", w.pick(*range(256))
    w.line(f"return {returned}")
    names = ", ".join(x.name for x in w.inputs)
    text = f"def attention({names}):\n" + "".join(f"    {x}\n" for x in w.lines)
    return Written(text, tuple(w.inputs), w.dtype, fused, w.dynamic, inner, seed, dropout, sites=sites)


def programs() -> st.SearchStrategy[Written]:
    """Attention programs: nine in ten have to fuse, the others are spoiled by one edit and must be refused."""
    return decisions(160).map(write)
