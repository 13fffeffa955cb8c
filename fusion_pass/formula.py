"""Score programs for people: ``softmax(where(k <= q, q k^T / 8, -inf) + bias[h, q, k])`` and the mask facts in words."""

# sympy is not typed
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false
from __future__ import annotations

from collections.abc import Sequence

import sympy
from fusion_kernels.float16_sums import inside
from fusion_kernels.masks import pair_split, split
from fusion_kernels.program import Node, Program
from fusion_kernels.tiles import full_program, key_mask, kv_bounds

from .site import MaskFacts

__all__ = ["formula", "mask_facts"]

_INFIX = {"add": ("+", 4), "sub": ("-", 4), "mul": ("*", 5), "div": ("/", 5), "floordiv": ("//", 5), "mod": ("%", 5),
          "lt": ("<", 3), "le": ("<=", 3), "gt": (">", 3), "ge": (">=", 3), "eq": ("==", 3), "ne": ("!=", 3),
          "and": ("and", 1), "or": ("or", 0), "xor": ("!=", 3), "pow": ("**", 6)}  # fmt: skip
_SILENT = frozenset({"to_float", "to_int", "to_bool", "round_float16", "round_bfloat16"})
_LONGEST = 400
_P = "\0"  # the probabilities, in a text that is only counted


def formula(program: Program, names: Sequence[str], params: Sequence[str]) -> str:
    """``softmax(...)`` of the score, with the user's names for tensors and sizes; ``softmax([score, sink])`` with a sink.

    A weight is written around it: ``softmax(...) * mask[b, k]``.
    """
    printer = _Printer(names, params)
    text = printer.text(program.root)
    text = f"softmax({text})" if program.sink is None else f"softmax([{text}, {printer.text(program.sink)}])"
    if program.weight is not None:
        text = _weighted(program.weight, text, names, params)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ...)"


def _weighted(weight: Node, text: str, names: Sequence[str], params: Sequence[str]) -> str:
    """A weight of the probabilities `text`, which have a letter of their own if they are named twice."""
    once = _Printer(names, params, _P).text(weight).count(_P) == 1
    return _Printer(names, params, text).text(weight) if once else f"{_Printer(names, params, 'p').text(weight)} of p = {text}"


def mask_facts(program: Program, names: Sequence[str], params: Sequence[str], learned: tuple[int, ...] = ()) -> MaskFacts:
    """Which keys a query can see: by position, by tensors that hide a key from every query, and by tensors that hide it from
    some; whether tiles are skipped.

    learned: the captures that need a gradient.
    """
    printer = _Printer(names, params)
    facts = []
    if (found := split(program.root)) is not None and kv_bounds(program) is not None:
        words, causal = [], False
        for part in _conjuncts(found.dead, False):
            text, bounds_keys = _condition(part, printer)
            words.append(text)
            causal |= bounds_keys
        facts.append(f"{'causal' if causal else 'masked by position'}: {' and '.join(words)}")
    if (hidden := key_mask(program)) is not None:
        facts.append(f"padding: {_all(hidden, True, printer)}")
    if (pairs := pair_split(full_program(program, keys=True).root, learned)) is not None:
        facts.append(f"by query and key: {_all(pairs.dead, False, printer)}")
    return MaskFacts("; ".join(facts) or "full: no key is known to be masked from positions alone", bool(facts))


def _all(node: Node, wanted: bool, printer: _Printer) -> str:
    return " and ".join(printer.text(c, 1) for c in _conjuncts(node, wanted))


_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def _conjuncts(node: Node, wanted: bool) -> list[Node]:
    """Conditions that hold together where `node` is `wanted`, negations moved inward."""
    if node.op == "not":
        return _conjuncts(node.args[0], not wanted)
    if node.op == ("and" if wanted else "or"):
        return [c for a in node.args for c in _conjuncts(a, wanted)]
    if wanted:
        return [node]
    if node.op in _OPPOSITE:
        return [Node.make(_OPPOSITE[node.op], *node.args)]
    return [Node.make("not", node)]


def _condition(node: Node, printer: _Printer) -> tuple[str, bool]:
    """A condition as text, solved for k where it is linear, and whether it is of the form k <= q + c."""
    if node.op not in _OPPOSITE or node.args[0].kind != "int":
        return printer.text(node, 1), False
    try:
        k = sympy.Symbol("k")
        left, right = (_sympy(a, printer) for a in node.args)
        difference = sympy.expand(left - right)
        factor = difference.coeff(k, 1)
    except NotImplementedError:
        return printer.text(node, 1), False
    rest = sympy.expand(difference - factor * k)
    if factor not in (1, -1) or rest.has(k):
        return printer.text(node, 1), False
    op = node.op if factor == 1 else {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}.get(node.op, node.op)
    bound = -rest * factor
    if op in ("lt", "gt"):  # whole numbers: k < q + 1 is k <= q
        op, bound = {"lt": ("le", bound - 1), "gt": ("ge", bound + 1)}[op]
    below = op == "le" and bound.coeff(sympy.Symbol("q"), 1) == 1
    return f"k {_INFIX[op][0]} {bound}", below


def _sympy(node: Node, printer: _Printer) -> sympy.Expr:
    if node.op == "const":
        return sympy.Integer(int(node.attr))  # pyright: ignore[reportArgumentType]
    if node.op in ("index", "size", "param"):
        return sympy.Symbol(printer.text(node))
    if node.op in ("add", "sub", "mul"):
        a, b = (_sympy(x, printer) for x in node.args)
        return {"add": a + b, "sub": a - b, "mul": a * b}[node.op]
    raise NotImplementedError(node.op)


class _Printer:
    def __init__(self, names: Sequence[str], params: Sequence[str], score: str = "q k^T") -> None:
        self.names, self.params, self.score = names, params, score

    def text(self, node: Node, outer: int = -1) -> str:
        if node.op == "score":
            return self.score
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
        if (total := inside(node)) is not None:
            return self.text(total, outer)
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
            (a,) = node.args
            if a.op in _OPPOSITE and a.args[0].kind == "int":
                return self.text(Node.make(_OPPOSITE[a.op], *a.args), outer)
            return self._wrap(f"not {self.text(node.args[0], 2)}", 2, outer)
        return f"{node.op}({', '.join(self.text(a) for a in node.args)})"

    @staticmethod
    def _wrap(text: str, level: int, outer: int) -> str:
        return f"({text})" if level < outer else text

    @staticmethod
    def _number(value: object) -> str:
        return f"{value + 0.0:.6g}" if isinstance(value, float) else str(value)  # a zero without its sign
