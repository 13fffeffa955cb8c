"""Triton source for the nodes of a score program: one assignment a node, registered so that Triton can read it back."""

from __future__ import annotations

import hashlib
import linecache
import math
import struct
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import device
from .program import Node, Program, postorder

__all__ = ["INDEX_LIMIT", "Writer", "axes", "function", "index_axes", "interpreted"]

INDEX_LIMIT = 2**22  # longest sequence: index arithmetic stays inside int32, and indices are exact in fp32


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: its functions then run as numpy, on CPU tensors."""
    return not isinstance(device.dot, triton.JITFunction)


# ---------------------------------------------------------------- source text of a node

# {0}, {1}, {2}: the arguments. Everything is fp32, int32 (int64 where a product could overflow) or int1.
_TEXT = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "log": "libdevice.log({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "libdevice.rsqrt({0})",
    "tanh": "device.tanh_exact({0})",
    "sigmoid": "device.sigmoid({0})",
    "sin": "libdevice.sin({0})",
    "cos": "libdevice.cos({0})",
    "erf": "tl.erf({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "trunc": "device.truncate({0})",
    "log1p": "libdevice.log1p({0})",
    "expm1": "libdevice.expm1({0})",
    "pow": "libdevice.pow({0}, {1})",
    "floordiv": "device.floor_divide({0}, {1})",
    "mod": "device.floor_modulo({0}, {1})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "{0} == 0",
    "isnan": "{0} != {0}",
    "isinf": "tl.abs({0}) == float('inf')",
    "where": "tl.where({0}, {1}, {2})",
    "to_float": "tl.cast({0}, tl.float32)",
    "to_int": "tl.cast({0}, tl.int32)",
    "to_bool": "{0} != 0",
    "round_float16": "tl.cast(tl.cast({0}, tl.float16), tl.float32)",
    "round_bfloat16": "tl.cast(tl.cast({0}, tl.bfloat16), tl.float32)",
}
_INTERPRETER = {
    "log": "tl.log({0})",
    "rsqrt": "tl.rsqrt({0})",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "log1p": "device.log1p_plain({0})",
    "expm1": "device.expm1_plain({0})",
    "pow": "device.power_plain({0}, {1})",
}
_BFLOAT16 = {"tanh": "device.tanh_approximate({0})"}  # eager rounds this value to bf16: four times the error
_EXTREMA = {"maximum": "tl.maximum({0}, {1}{2})", "minimum": "tl.minimum({0}, {1}{2})"}
_PROPAGATE = ", propagate_nan=tl.PropagateNan.ALL"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return f"tl.full((), {int(value)}, tl.int1)"
    if isinstance(value, int):
        return f"({value})"
    assert isinstance(value, float)
    if math.isfinite(value):  # as fp32 sees it: Triton would make a tensor of a larger or subnormal literal fp64
        try:
            value = struct.unpack("f", struct.pack("f", value))[0]
        except OverflowError:
            value = math.copysign(math.inf, value)
    if not math.isfinite(value):
        return f"float('{value}')"
    return f"({value!r})" if abs(value) >= 2.0**-126 else "(0.0)"


def axes(node: Node) -> tuple[bool, bool]:
    """Whether the value varies along the query axis, and along the key axis, of a tile."""
    scores = any(leaf.op in ("score", "grad") for leaf in node.leaves)
    return scores or node.depends_on("q"), scores or node.depends_on("k")


def _not_negative(node: Node) -> bool:
    if node.op in ("index", "size"):
        return True
    if node.op == "const":
        return node.attr >= 0  # type: ignore[operator]
    return node.op in ("add", "mul", "floordiv", "mod", "maximum", "minimum") and all(map(_not_negative, node.args))


def _magnitude(node: Node) -> float:
    """A bound of |node| for an integer expression of indices and sizes; inf where tensors or parameters are read."""
    if node.op in ("index", "size"):
        return INDEX_LIMIT
    if node.op == "const":
        return abs(node.attr)  # type: ignore[arg-type]
    sizes = [_magnitude(a) for a in node.args]
    match node.op:
        case "add" | "sub":
            return sum(sizes)
        case "mul":
            return sizes[0] * sizes[1]
        case "neg" | "abs" | "floordiv":
            return sizes[0]
        case "maximum" | "minimum":
            return max(sizes)
    return math.inf


class Writer:
    """Python source for a set of nodes: one assignment a node, arguments first."""

    def __init__(self, program: Program, fast_bfloat16: bool) -> None:
        self.program = program
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}
        self.text = dict(_TEXT)
        if interpreted():
            self.text.update(_INTERPRETER)
        elif fast_bfloat16:
            self.text.update(_BFLOAT16)
        first = program.params  # where each capture's pointer is in aux
        self.pointers = [first + sum(1 + c.rank for c in program.captures[:i]) for i in range(len(program.captures))]

    def write(self, *roots: Node) -> list[str]:
        for node in postorder(*roots):
            if node not in self.names:
                self.names[node] = self.assign(self._expression(node)) if node.op not in ("const", "index") else self._leaf(node)
        return [self.names[r] for r in roots]

    def assign(self, expression: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def _leaf(self, node: Node) -> str:
        return _literal(node.attr) if node.op == "const" else str(node.attr)

    def _expression(self, node: Node) -> str:
        match node.op:
            case "score":
                return "s"
            case "grad":
                return "grad"
            case "size":
                return f"sizes[{'BHNM'.index(str(node.attr))}]"
            case "param":
                return f"aux[{node.attr}]"
            case "load":
                return self._load(node)
        args = [self.names[a] for a in node.args]
        if node.op in _EXTREMA:
            return _EXTREMA[node.op].format(*args, _PROPAGATE if node.kind == "float" else "")
        if node.op == "mul" and node.kind == "int" and _magnitude(node) >= 2**31:
            return f"tl.cast({args[0]}, tl.int64) * {args[1]}"
        if node.op in ("floordiv", "mod") and all(map(_not_negative, node.args)):
            return f"{args[0]} {'//' if node.op == 'floordiv' else '%'} {args[1]}"
        if node.op == "to_float" and node.args[0].kind == "int":
            return self._to_float(node.args[0])
        return self.text[node.op].format(*args)

    def _to_float(self, node: Node) -> str:
        """float(q - k) as float(q) - float(k): conversions a row instead of an element. Exact below 2^24."""
        if all(axes(node)) and _magnitude(node) < 2**24:
            if node.op in ("add", "sub"):
                return f"({self._to_float(node.args[0])} {'+' if node.op == 'add' else '-'} {self._to_float(node.args[1])})"
            if node.op in ("neg", "abs"):
                return f"({self.text[node.op].format(self._to_float(node.args[0]))})"
        if node.op == "const":
            return _literal(float(node.attr))  # type: ignore[arg-type]
        return f"tl.cast({self.names[node]}, tl.float32)"

    def pointer(self, node: Node, source: str, first: int) -> str:
        """Where a load reads: the pointer at source[first], moved along each dim by its index times its stride."""
        terms = []
        for dim, i in enumerate(node.args):
            if i.op == "const" and i.attr == 0:
                continue
            terms.append((sum(axes(i)), f"tl.cast({self.names[i]}, tl.int64) * {source}[{first + 1 + dim}]"))
        return " + ".join([f"{source}[{first}]", *(t for _, t in sorted(terms, key=lambda t: t[0]))])  # scalars first

    def mask(self, node: Node) -> str:
        return " & ".join(name for name, varies in zip(("q_ok", "k_ok"), index_axes(node), strict=True) if varies)

    def _load(self, node: Node) -> str:
        position = node.attr
        assert isinstance(position, int)
        pointer = self.pointer(node, "aux", self.pointers[position])
        mask = self.mask(node)
        value = f"tl.load({pointer}, mask={mask}, other=0)" if mask else f"tl.load({pointer})"
        kind = self.program.captures[position].kind
        return f"tl.cast({value}, tl.float32)" if kind == "float" else f"({value} != 0)" if kind == "bool" else value


def index_axes(node: Node) -> tuple[bool, bool]:
    found = [axes(i) for i in node.args]
    return any(a[0] for a in found), any(a[1] for a in found)


def function(name: str, arguments: str, lines: Sequence[str]) -> Any:
    """The @triton.jit function with this body, compiled from a source that `inspect` can read back.

    The name ends in a hash of the body: Triton compiles a function that gets others as constants once for each of their names,
    so that two bodies of one name would be one (a masked loop ran with the score of the full one).
    """
    body = f"({arguments}):\n" + "".join(f"    {line}\n" for line in lines)
    name = f"{name}_{hashlib.sha256(body.encode()).hexdigest()[:16]}"
    source = f"@triton.jit\ndef {name}{body}"
    filename = f"<fusion_kernels {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"tl": tl, "triton": triton, "device": device, "libdevice": libdevice, "__name__": "fusion_kernels.generated"}
    exec(compile(source, filename, "exec"), namespace)
    return namespace[name]
