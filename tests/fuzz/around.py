"""What stands around the softmax of a written program: a column that is no key before it, weights of probabilities after it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["AroundWriter"]

GUARDS = (
    "p = torch.nan_to_num(p)",
    "p = p.nan_to_num(0.0)",
    "p = torch.where(torch.isnan(p), 0.0, p)",
    "p = p.masked_fill(p.isnan(), 0)",
    "p = torch.where(p != p, torch.zeros_like(p), p)",
)


class AroundWriter:
    """Writes for a `Writer`. selects: whether some probabilities are chosen to be 0; subtracts: whether two softmaxes are."""

    def __init__(self, writer: Any) -> None:
        self.w, self.selects, self.subtracts = writer, False, False

    def column(self) -> str:
        """A column that takes part in the softmax alone, at times; the slice that leaves it out again, or an empty text."""
        w = self.w
        if not w.chance(8):
            return ""
        zeros = ["torch.zeros_like(s[..., :1])", "s.new_zeros(*s.shape[:-1], 1)"]
        if w.s.lead and w.chance(60):
            heads = w.s.lead[-1]
            z = w.input("sink", heads)
            column = w.pick(f"{z}.view({heads}, 1, 1).expand(*s.shape[:-1], 1)", f"{z}[:, None, None].expand(*s.shape[:-1], -1)")
            column = w.pick(column, f"({column}).to(s.dtype)")
        else:
            column = w.pick(*zeros)
        if w.chance(20):
            w.line("s = F.pad(s, (0, 1))")
        elif w.chance(30):
            w.line(f"s = torch.cat([{column}, s], dim=-1)")
            return "p = p[..., 1:]"
        else:
            w.line(f"s = torch.cat(({column}, s)[::-1], -1)")
        return w.pick("p = p[..., :-1]", "p = p[..., :m]", "p = p.narrow(-1, 0, m)")

    def difference(self) -> bool:
        """At times a second softmax, of other scores of the same product, is taken from the first."""
        if not self.w.chance(5):
            return False
        self.subtracts = True
        scores, share = self.w.pick("s * 0.5", "-s"), self.w.pick("0.5", "0.25")
        self.w.line(f"p = p - {share} * torch.softmax({scores}, -1).to(p.dtype)")
        return True

    def weight(self) -> None:
        """At times something linear in each probability: a factor, a mask that is applied again, a guard against NaN."""
        w = self.w
        if not w.chance(8):
            return
        guard = "number" if self.subtracts else "guard"  # whether a difference is NaN is no question to each of its terms
        kind = w.pick("heads", "mask", "mask", "again", guard, "number")
        self.selects |= kind in ("guard", "mask")
        if kind == "guard":
            return w.line(w.pick(*GUARDS))
        if kind == "number":
            return w.line(w.pick("p = p * 0.5", "p = -p", "p = p / 3.0"))
        if kind == "heads" and w.s.lead:
            return w.line(f"p = p * {w.input('weight', w.s.lead[-1], 1, 1)}.to(p.dtype)")
        if kind == "mask":
            keep = w.input("kept", *w.broadcast(), kind="keep", dtype=torch.bool)
            forms = (f"p = p.masked_fill(~{keep}, 0.0)", f"p = p * {keep}", f"p = torch.where({keep}, p, 0.0)")
            return w.line(w.pick(*forms))
        w.line(f"p = p * {w.input('weight', *w.broadcast())}.to(p.dtype)")
