"""How queries, keys and values come into a written program: the layouts, and kv heads that a group shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fuzz.decisions import Decisions
from fuzz.inputs import Input

__all__ = ["LENGTHS", "OperandWriter", "Sizes"]

LENGTHS = (1, 2, 3, 5, 7, 16, 17, 31, 33, 63)
LONG_LENGTHS = (64, 65, 127, 129, 160, 197)
HEAD_DIMS = (1, 3, 8, 16, 24, 40, 72)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the attention; lead: the dims before (query, key) of the scores as the code has them."""

    b: int
    h: int
    hkv: int
    n: int
    m: int
    d: int
    dv: int
    lead: tuple[int, ...] = ()


class OperandWriter(Decisions):
    """Draws the sizes, and writes the lines that q, k and v come in by.

    lengths: of queries and keys, in place of those that are drawn.
    """

    def __init__(self, source: bytes, lengths: tuple[int, int] | None = None) -> None:
        super().__init__(source)
        self.lengths = lengths
        self.lines: list[str] = []
        self.inputs: list[Input] = []
        self.broadcast_heads = 1  # query heads of one kv head, where the products broadcast: einsum folds them into the rows
        self.s: Sizes

    def line(self, text: str) -> None:
        self.lines.append(text)

    def input(self, name: str, *shape: int, **options: Any) -> str:
        if any(x.name == name for x in self.inputs):
            name = f"{name}{len(self.inputs)}"
        options.setdefault("grad", options.get("kind", "normal") == "normal" and self.chance(70))
        if len(shape) > 1 and self.chance(20):
            options["order"] = self.shuffled(len(shape))
        self.inputs.append(Input(name, shape, **options))
        return name

    def _sizes(self) -> Sizes:
        lengths = LONG_LENGTHS if self.chance(12) else LENGTHS
        n = self.pick(*lengths)
        m = n if self.chance(50) else self.pick(*lengths)
        long = max(n, m) > 63
        b, hkv = self.pick(1, 2) if long else self.pick(1, 2, 3), self.pick(1, 2) if long else self.pick(1, 2, 3)
        group = self.pick(1, 1, 1, 2, 3)
        d = self.pick(*HEAD_DIMS)
        n, m = self.lengths or (n, m)
        return Sizes(b, hkv * group, hkv, n, m, d, d if self.chance(60) else self.pick(*HEAD_DIMS))

    def resize(self, **sizes: Any) -> None:
        self.s = Sizes(**{**self.s.__dict__, **sizes})

    def operands(self) -> None:
        layouts = ("four", "bnhd", "three", "merged", "two", "five", "hidden", "packed", "projected")
        layout = self.pick(*layouts)
        getattr(self, f"_{layout}")()
        self.line("n, m, d = q.shape[-2], k.shape[-2], q.shape[-1]")
        if self.chance(10):
            which = self.pick("q", "k", "v")
            self.line(f"{which} = {which}.{self.pick('contiguous()', 'clone()')}")

    def _scale_of_inputs(self) -> float:
        return self.pick(1.0, 1.0, 1.0, 4.0, 0.0625)

    def _four(self) -> None:
        s = self.s
        extra = self.pick(0, 0, 0, 1, 5)  # the head dim as a slice: rows further apart than their length
        for name, h, rows, d in (("q", s.h, s.n, s.d), ("k", s.hkv, s.m, s.d), ("v", s.hkv, s.m, s.dv)):
            self.input(name, s.b, h, rows, d + extra, scale=self._scale_of_inputs())
            if extra:
                self.line(f"{name} = {name}[..., {self.pick(f':{d}', f'{extra}:')}]")
        self._groups()

    def _bnhd(self) -> None:
        s = self.s
        for name, h, rows, d in (("q", s.h, s.n, s.d), ("k", s.hkv, s.m, s.d), ("v", s.hkv, s.m, s.dv)):
            self.input(name, s.b, rows, h, d, scale=self._scale_of_inputs())
            self.line(f"{name} = {name}.{self.pick('transpose(1, 2)', 'permute(0, 2, 1, 3)', 'swapaxes(1, 2)')}")
        self._groups()

    def _three(self) -> None:
        s, size = self.s, self.s.b * self.s.h
        for name, rows, d in (("q", s.n, s.d), ("k", s.m, s.d), ("v", s.m, s.dv)):
            self.input(name, size, rows, d, scale=self._scale_of_inputs())
        self.resize(lead=(size,))

    def _merged(self) -> None:
        """(B, N, H D) to (B H, N, D), as BART does it."""
        s = self.s
        for name, rows, d in (("q", s.n, s.d), ("k", s.m, s.d), ("v", s.m, s.dv)):
            self.input(name, s.b, rows, s.h * d, scale=self._scale_of_inputs())
            self.line(f"{name} = {name}.view({s.b}, -1, {s.h}, {d}).transpose(1, 2).reshape({s.b * s.h}, -1, {d})")
        self.resize(lead=(s.b * s.h,))

    def _two(self) -> None:
        s = self.s
        for name, rows, d in (("q", s.n, s.d), ("k", s.m, s.d), ("v", s.m, s.dv)):
            self.input(name, rows, d, scale=self._scale_of_inputs())
        self.resize(lead=())

    def _five(self) -> None:
        s, outer = self.s, self.pick(1, 2)
        for name, rows, d in (("q", s.n, s.d), ("k", s.m, s.d), ("v", s.m, s.dv)):
            self.input(name, s.b, outer, s.hkv, rows, d, scale=self._scale_of_inputs())
        self.resize(lead=(s.b, outer, s.hkv))

    def _hidden(self) -> None:
        s = self.s
        for name, h, rows, d in (("q", s.h, s.n, s.d), ("k", s.hkv, s.m, s.d), ("v", s.hkv, s.m, s.dv)):
            self.input(name, s.b, rows, h * d, order=None, scale=self._scale_of_inputs())
            view = self.pick(f"view({s.b}, -1, {h}, {d})", f"unflatten(-1, ({h}, {d}))", f"reshape({s.b}, -1, {h}, {d})")
            view = view.replace("view", "reshape") if self.inputs[-1].order else view
            self.line(f"{name} = {name}.{view}.transpose(1, 2)")
        self._groups()

    def _packed(self) -> None:
        s = self.s
        self.resize(m=s.n, dv=s.d, hkv=s.h, lead=(s.b, s.h))
        self.input("x", s.b, s.n, 3 * s.h * s.d, scale=self._scale_of_inputs())
        shape = f"{s.b}, -1, {s.h}, {s.d}"
        form = self.pick("chunk", "split", "unbind", "permute", "slice")
        if form in ("chunk", "split"):
            self.line(f"q, k, v = x.{'chunk(3, dim=-1)' if form == 'chunk' else f'split({s.h * s.d}, dim=2)'}")
            self.line(f"q, k, v = (t.reshape({shape}).transpose(1, 2) for t in (q, k, v))")
        elif form == "slice":
            w = s.h * s.d
            self.line(f"q, k, v = x[..., :{w}], x[..., {w}:{2 * w}], x[..., {2 * w}:]")
            self.line(f"q, k, v = (t.reshape({shape}).transpose(1, 2) for t in (q, k, v))")
        elif form == "unbind":
            self.line(f"q, k, v = x.reshape({s.b}, -1, 3, {s.h}, {s.d}).transpose(1, 3).unbind(2)")
        else:
            self.line(f"q, k, v = x.reshape({s.b}, -1, 3, {s.h}, {s.d}).permute(2, 0, 3, 1, 4)")

    def _projected(self) -> None:
        s, e = self.s, self.pick(1, 8, 20)
        self.input("x", s.b, s.n, e)
        source = "x" if s.n == s.m else self.input("y", s.b, s.m, e)
        for name, of, h, d in (("q", "x", s.h, s.d), ("k", source, s.hkv, s.d), ("v", source, s.hkv, s.dv)):
            weight = self.input(f"w{name}", h * d, e, scale=e**-0.5)
            self.line(f"{name} = F.linear({of}, {weight}).view({s.b}, -1, {h}, {d}).transpose(1, 2)")
        self._groups()

    def _groups(self) -> None:
        """Grouped kv heads: repeated in one of the usual ways, or left for the product to broadcast."""
        s = self.s
        group = s.h // s.hkv
        self.resize(lead=(s.b, s.h))
        if group == 1:
            return
        ways = ["repeat", "expand", "einsum"] + ["broadcast"] * (s.hkv == 1)
        way = self.pick(*ways)
        if way in ("broadcast", "einsum"):
            self.broadcast_heads = group
        if way == "broadcast":
            return
        if way == "einsum":  # (B, Hkv, G, N, D) against (B, Hkv, 1, M, D)
            self.line(f"q, k, v = q.unflatten(1, ({s.hkv}, {group})), k.unsqueeze(2), v.unsqueeze(2)")
            self.resize(lead=(s.b, s.hkv, group))
            return
        for name in ("k", "v"):
            if way == "repeat":
                self.line(f"{name} = {name}.repeat_interleave({group}, dim=1)")
            else:
                self.line(
                    f"{name} = {name}[:, :, None].expand(-1, -1, {group}, -1, -1).reshape({s.b}, {s.h}, -1, {name}.shape[-1])"
                )
