"""Masks of a written program: predicates over positions and data, composed, and every way to apply one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

__all__ = ["MaskWriter"]


class MaskWriter:
    """Writes masks for a `Writer`.

    structural: some mask so far is made of positions, so that tiles may be skipped. absorbing: some hides keys by a number that
    swallows a score, and may hide a whole row by it.
    """

    def __init__(self, writer: Any) -> None:
        self.w, self.structural, self.absorbing = writer, False, False
        self.named: set[str] = set()

    # ------------------------------------------------------------ positions

    def rows(self) -> str:
        """The variable of the query positions, (n, 1); defined on first use, at times counted from the end of the keys."""
        past = self.w.pick("", "", " + (m - n)") if self.w.s.m >= self.w.s.n else ""
        return self._define("i", f"torch.arange(n, device=q.device)[:, None]{past}")

    def columns(self) -> str:
        return self._define("j", self.w.pick("torch.arange(m, device=q.device)", "torch.arange(m, device=q.device)[None, :]"))

    def _define(self, name: str, value: str) -> str:
        if name not in self.named:
            self.named.add(name)
            self.w.line(f"{name} = {value}")
        return name

    def position(self) -> str:
        """A predicate of positions alone, true where the query may see the key."""
        self.structural = True
        c = self.w.pick(0, 1, 2, 5, 20, 64)
        if self.w.chance(40):
            square = (
                f"torch.ones(n, m, dtype=torch.bool, device=q.device).{self.w.pick('tril', 'triu')}({self.w.pick(0, 0, c, -c)})"
            )
            return self.w.pick(square, f"~{square}")
        i, j, width = self.rows(), self.columns(), max(c, 1)
        return self.w.pick(
            f"({j} <= {i})", f"({i} >= {j})", f"({j} <= {i}) & ({j} > {i} - {width})", f"(({i} - {j}).abs() < {width})",
            f"({i} // {width} == {j} // {width})", f"(({j} < {c}) | ({j} <= {i}))", f"({j} - {i} < {c})", f"({i} + {j} > {c})",
            f"({j} % {width} == 0)", f"({j} < {c})", f"({i} < {c})", f"({i} != {j})",
        )  # fmt: skip

    # ------------------------------------------------------------ data

    def data(self) -> str:
        """A predicate read from tensors."""
        w = self.w
        form = w.pick("keep", "keep", "keep", "int", "float", "ids", "outer")
        if form == "ids":
            batch = (*w.s.lead[:1], *(1 for _ in w.s.lead[1:]))
            a, b = w.input("qid", *batch, w.s.n, kind="ids"), w.input("kid", *batch, w.s.m, kind="ids")
            return f"({a}[..., :, None] == {b}[..., None, :])"
        dead = w.chance(25)
        if form == "outer":
            a, b = (
                w.input("qok", w.s.n, kind="keep", dtype=torch.bool, dead=dead),
                w.input("kok", w.s.m, kind="keep", dtype=torch.bool),
            )
            return f"({a}[:, None] & {b}[None, :])"
        dtype = {"keep": torch.bool, "int": torch.int64, "float": torch.float32}[form]
        x = w.input("keep", *w.broadcast(), kind="keep", dtype=dtype, dead=dead)
        return x if form == "keep" else w.pick(f"({x} != 0)", f"({x} > 0)", f"({x}.bool())")

    def predicate(self) -> str:
        first = self.position() if self.w.chance(50) else self.data()
        if not self.w.chance(35):
            return first
        second = self.position() if self.w.chance(50) else self.data()
        return self.w.pick(f"({first} & {second})", f"({first} | {second})", f"torch.logical_and({first}, {second})",
                           f"({first} & ~({second}))")  # fmt: skip

    # ------------------------------------------------------------ applying

    def mask(self) -> None:
        w = self.w
        if w.chance(20):
            fill = w.pick(-math.inf, -math.inf, torch.finfo(w.dtype).min, -1e4)
            self.absorbing |= -math.inf < fill < -1e4
            x = w.float_input("mask", *w.broadcast(), kind="additive", fill=fill, dead=w.chance(25), grad=False)
            return w.line(w.pick(f"s = s + {x}", f"s = {x} + s", f"s = torch.add(s, {x})"))
        p = self.predicate()
        # -1e9 is no fp16 number: torch refuses it as a fill. The lowest number is that of the scores, in their float64 run too.
        lowest = f"torch.finfo({w.low}).min"
        finite = w.pick(lowest, "-1e4", *["-1e9"] * (w.dtype != torch.float16))
        fill = w.pick("float('-inf')", "float('-inf')", "-torch.inf", finite)
        # A `where` of two numbers makes fp32, torch's default dtype, which has no number as low as the lowest of float64.
        of_numbers = "torch.finfo(torch.float32).min" if (w.low, fill) == (torch.float64, lowest) else fill
        self.absorbing |= fill not in ("float('-inf')", "-torch.inf", "-1e4") or finite != "-1e4"
        hidden = w.pick(f"~({p})", f"({p}).logical_not()", f"({p}) == 0")
        forms = (
            [f"s = s.masked_fill({hidden}, {fill})"],
            *[[f"s.masked_fill_(~({p}), {fill})"]] * w.editable,
            [f"s = torch.where({p}, s, {fill})"],
            [f"s = torch.where({p}, s, torch.full([], {fill}, dtype=s.dtype, device=s.device))"],
            [f"s = torch.where(~({p}), {fill}, s)"],
            [f"s = s + torch.where({p}, 0.0, {of_numbers}).to(s.dtype)"],
            [f"bias_ = torch.zeros(n, m, dtype=s.dtype).expand_as(s).masked_fill(~({p}), {fill})", "s = s + bias_"],
            [f"s = s + (1.0 - ({p}).to(s.dtype)) * {finite}"],
            [f"keep_ = ({p}).to(s.dtype)", "s = s * keep_ - 1e4 * (1 - keep_)"],
        )
        for line in w.pick(*forms):
            w.line(line)

    # ------------------------------------------------------------ NaN and infinity

    def poison(self) -> None:
        """At times one NaN or infinity in an input.

        Under a mask of positions only a NaN in q, and only where no gradient but those of q and v is asked for: what position
        alone hides is in a tile that is never read, where eager multiplies by zero (0 * NaN = NaN, and 0 * inf). That is the one
        difference from eager that the op documents; a row that is NaN has to be NaN all the same.
        """
        w = self.w
        if not w.chance(8):
            return
        if self.structural and any(x.grad and x.name not in ("q", "v", "wq", "wv") for x in w.inputs):
            return
        names = ("q", "wq") if self.structural else tuple(x.name for x in w.inputs if x.kind in ("normal", "additive"))
        if w.around.selects:  # delta is read from the result, which has the NaN of a value that is hidden after the softmax
            names = tuple(n for n in names if n not in ("v", "wv", "x", "y"))
        able = [i for i, x in enumerate(w.inputs) if x.name in names]
        if able:
            i = w.pick(*able)
            value = w.pick(math.nan, math.inf, -math.inf)
            w.inputs[i] = replace(w.inputs[i], poison=math.nan if self.structural else value)
