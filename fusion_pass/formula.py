"""Score programs for people: ``softmax(where(k <= q, q k^T / 8, -inf) + bias[h, q, k])`` and the mask facts in words."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_kernels.program import Node, Program, postorder
from fusion_kernels.tiles import full_program, kv_bounds

from .site import MaskFacts

__all__ = ["formula", "mask_facts"]

_INFIX = {"add": ("+", 4), "sub": ("-", 4), "mul": ("*", 5), "div": ("/", 5), "floordiv": ("//", 5), "mod": ("%", 5),
          "lt": ("<", 3), "le": ("<=", 3), "gt": (">", 3), "ge": (">=", 3), "eq": ("==", 3), "ne": ("!=", 3),
          "and": ("and", 1), "or": ("or", 0), "xor": ("!=", 3), "pow": ("**", 6)}  # fmt: skip
_SILENT = frozenset({"to_float", "to_int", "to_bool", "round_float16", "round_bfloat16"})
_LONGEST = 400


def formula(program: Program, names: Sequence[str], params: Sequence[str]) -> str:
    """``softmax(...)`` of the score, with the user's names for tensors and sizes."""
    text = f"softmax({_Printer(names, params).text(program.root)})"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ...)"


def mask_facts(program: Program, names: Sequence[str], params: Sequence[str]) -> MaskFacts:
    """What the program alone proves about the mask: which keys a query can see, and whether tiles are skipped."""
    if kv_bounds(program) is None:
        return MaskFacts("full: no key is known to be masked from positions alone", False)
    printer = _Printer(names, params)
    kept = set(postorder(full_program(program).root))
    gone = [n for n in postorder(program.root) if n.kind == "bool" and n not in kept and _positions_only(n)]
    outer = [n for n in gone if not any(n in m.args and m.kind == "bool" for m in gone)]
    words = " and ".join(printer.text(n, 1) for n in outer)
    kind = "causal" if any(_causal(n) for n in gone) else "masked by position"
    return MaskFacts(f"{kind}: {words}" if words else kind, True)


def _positions_only(node: Node) -> bool:
    return node.depends_on("q", "k") and not any(leaf.op in ("score", "load", "grad") for leaf in node.leaves)


def _causal(node: Node) -> bool:
    """k <= q + c, in any of its spellings."""
    if node.op not in ("le", "lt", "ge", "gt"):
        return False
    small, large = node.args if node.op in ("le", "lt") else node.args[::-1]
    return small.depends_on("k") and large.depends_on("q")


class _Printer:
    def __init__(self, names: Sequence[str], params: Sequence[str]) -> None:
        self.names, self.params = names, params

    def text(self, node: Node, outer: int = -1) -> str:
        if node.op == "score":
            return "q k^T"
        if node.op == "const":
            return self._number(node.attr)
        if node.op in ("index", "size"):
            return str(node.attr)
        if node.op == "param":
            return self.params[int(node.attr)]  # pyright: ignore[reportArgumentType]
        if node.op == "load":
            name = self.names[int(node.attr)]  # pyright: ignore[reportArgumentType]
            return f"{name}[{', '.join(self.text(a) for a in node.args)}]" if node.args else name
        if node.op in _SILENT:
            return self.text(node.args[0], outer)
        if node.op == "mul" and node.args[1].op == "const" and isinstance(node.args[1].attr, float):
            inverse = 1 / node.args[1].attr if node.args[1].attr else 0.0
            if inverse > 1.5 and abs(inverse - round(inverse)) < 1e-9:
                return self._wrap(f"{self.text(node.args[0], 5)} / {round(inverse)}", 5, outer)
        if node.op in _INFIX:
            sign, level = _INFIX[node.op]
            left, right = self.text(node.args[0], level), self.text(node.args[1], level + (sign in "-/%//"))
            return self._wrap(f"{left} {sign} {right}", level, outer)
        if node.op == "neg":
            return self._wrap(f"-{self.text(node.args[0], 6)}", 4, outer)
        if node.op == "not":
            return self._wrap(f"not {self.text(node.args[0], 2)}", 2, outer)
        return f"{node.op}({', '.join(self.text(a) for a in node.args)})"

    @staticmethod
    def _wrap(text: str, level: int, outer: int) -> str:
        return f"({text})" if level < outer else text

    @staticmethod
    def _number(value: object) -> str:
        return f"{value:.6g}" if isinstance(value, float) else str(value)
