"""Score program -> @triton.jit functions.

A kernel gets them as constexpr arguments and calls them on a tile; the same source compiles inside any Triton kernel, in
Gluon, and in Triton's interpreter:

    score(s, b, h, q, k, q_ok, k_ok, sizes, aux)             -> x, the shape of s
    dscore(s, grad, b, h, q, k, q_ok, k_ok, sizes, aux)      -> d(loss)/d(s), given grad = d(loss)/d(x)
    captures(s, grad, ..., aux, daux)                        -> adds d(loss)/d(captures) to the buffers of daux
    bounds(q0, q1, b, h, sizes, aux)                         -> the four ends of `tiles.Bounds`; (k0, k1, ...) for query ranges

q and k are int32 indices that broadcast against s ((BLOCK_M, 1) and (1, BLOCK_N), or transposed), q_ok and k_ok say which
of them are inside the tensors (or are the constexpr True), sizes is (B, H, N, M), and aux holds the integer parameters and
then, for each capture, its pointer and its strides. An expression is computed at the shape of what it reads: a value that
depends on the row alone costs one operation a row.

The source is registered in `linecache` under a hash of itself, because Triton reads the source of what it compiles.
"""

from __future__ import annotations

import hashlib
import linecache
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import device, tiles
from .derivative import vjp
from .program import Node, Program, apply, const, postorder, rebuild

__all__ = ["INDEX_LIMIT", "Phase", "Table", "aux_arguments", "bounds", "gradient_arguments", "interpreted", "phase"]

INDEX_LIMIT = 2**22  # longest sequence: index arithmetic stays inside int32, and indices are exact in fp32
LOG2E = math.log2(math.e)


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
_BFLOAT16 = {"tanh": "device.tanh_approximate({0})"}  # eager rounds this value to bf16: eight times the error
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


def _axes(node: Node) -> tuple[bool, bool]:
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


class _Writer:
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
                self.names[node] = self._assign(self._expression(node)) if node.op not in ("const", "index") else self._leaf(node)
        return [self.names[r] for r in roots]

    def _assign(self, expression: str) -> str:
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
        if all(_axes(node)) and _magnitude(node) < 2**24:
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
            terms.append((sum(_axes(i)), f"tl.cast({self.names[i]}, tl.int64) * {source}[{first + 1 + dim}]"))
        return " + ".join([f"{source}[{first}]", *(t for _, t in sorted(terms, key=lambda t: t[0]))])  # scalars first

    def mask(self, node: Node) -> str:
        return " & ".join(name for name, varies in zip(("q_ok", "k_ok"), _index_axes(node), strict=True) if varies)

    def _load(self, node: Node) -> str:
        position = node.attr
        assert isinstance(position, int)
        pointer = self.pointer(node, "aux", self.pointers[position])
        mask = self.mask(node)
        value = f"tl.load({pointer}, mask={mask}, other=0)" if mask else f"tl.load({pointer})"
        kind = self.program.captures[position].kind
        return f"tl.cast({value}, tl.float32)" if kind == "float" else f"({value} != 0)" if kind == "bool" else value


def _index_axes(node: Node) -> tuple[bool, bool]:
    axes = [_axes(i) for i in node.args]
    return any(a[0] for a in axes), any(a[1] for a in axes)


def _function(name: str, arguments: str, lines: Sequence[str]) -> Any:
    """The @triton.jit function with this body, compiled from a source that `inspect` can read back."""
    source = f"@triton.jit\ndef {name}({arguments}):\n" + "".join(f"    {line}\n" for line in lines)
    filename = f"<fusion_kernels {name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"tl": tl, "triton": triton, "device": device, "libdevice": libdevice, "__name__": "fusion_kernels.generated"}
    exec(compile(source, filename, "exec"), namespace)
    return namespace[name]


# ---------------------------------------------------------------- float expressions, as kernels want them


def _canonical(root: Node) -> Node:
    """Division of a score by a constant as a product, and two constant factors as one: within an ulp of the original."""

    def replace(node: Node, args: tuple[Node, ...]) -> Node | None:
        if node.op not in ("mul", "div") or node.kind != "float" or not node.depends_on("score", "grad"):
            return None
        x, c = args if args[1].op == "const" or node.op == "div" else args[::-1]
        if c.op != "const" or not _ordinary(c.attr):
            return None
        factor = 1.0 / c.attr if node.op == "div" else c.attr  # type: ignore[operator]
        if x.op == "mul" and x.args[1].op == "const" and _ordinary(x.args[1].attr) and _ordinary(x.args[1].attr * factor):
            x, factor = x.args[0], x.args[1].attr * factor
        return apply("mul", x, const(factor))

    return rebuild(root, replace)


def _ordinary(value: Any) -> bool:
    return 1e-30 < abs(value) < 1e30


def _peel(root: Node, mask: float, positive: bool) -> tuple[Node, float]:
    """(inner, c) with root = c * inner, where `mask` (-inf or 0) times c is itself: the factor moves out of the inner loop."""
    if root.op == "mul" and root.args[1].op == "const" and _ordinary(root.args[1].attr):
        c = float(root.args[1].attr)  # type: ignore[arg-type]
        if c > 0 or not positive:
            return root.args[0], c
    if root.op == "where":
        p, a, b = root.args
        masked = [x.op == "const" and x.attr == mask for x in (a, b)]
        if masked[1]:
            inner, c = _peel(a, mask, positive)
            return apply("where", p, inner, b), c
        if masked[0]:
            inner, c = _peel(b, mask, positive)
            return apply("where", p, a, inner), c
    return root, 1.0


def _reaches(root: Node, size: float) -> bool:
    """Whether a masked score can be finite and beyond `size`: through a constant, or a tensor read along q or k."""
    for leaf in root.leaves:
        if leaf.op == "const" and leaf.kind == "float" and math.isfinite(leaf.attr) and abs(leaf.attr) >= size:  # type: ignore[arg-type]
            return True
        if leaf.op == "load" and leaf.kind == "float" and any(_index_axes(leaf)):
            return True
    return False


# ---------------------------------------------------------------- the functions of a program


@dataclass(frozen=True)
class Table:
    """A load at (q, k) of a table that several batches (all_b) or heads (all_h) share, and its gradient on a tile.

    gradient(s, grad, b, h, q, k, q_ok, k_ok, sizes, aux) -> d(loss)/d(value), the shape of s.
    """

    capture: int
    load: Node
    gradient: Any

    @property
    def all_b(self) -> bool:
        return not any(i.op == "index" and i.attr == "b" for i in self.load.args)

    @property
    def all_h(self) -> bool:
        return not any(i.op == "index" and i.attr == "h" for i in self.load.args)

    def strides(self, buffer: Any) -> tuple[tuple[int, ...], int]:
        """((stride of b, h, q, k), offset of the element at 0, 0, 0, 0) of the load in a tensor of the capture's shape."""
        steps = dict.fromkeys("bhqk", 0)
        offset = 0
        for step, i in zip(buffer.stride(), self.load.args, strict=True):
            if i.op == "index":
                steps[str(i.attr)] = step
            else:
                offset += step * i.attr  # type: ignore[operator]
        return tuple(steps.values()), offset


@dataclass(frozen=True)
class Phase:
    """A program (or its `full_program`) as device functions.

    x = factor * score(s, ...); d(loss)/d(s) = dfactor * dscore(s, d(loss)/d(x), ...).
    wide: x can be so large that x * log2(e) leaves fp32, or loses all its digits after the point.
    deep: a row can have nothing but scores so low that its log-sum-exp has no digits left for the sum.
    captures: adds the gradients of captured tensors, except those of `tables`; None where none is needed.
    """

    score: Any
    factor: float
    wide: bool
    deep: bool
    dscore: Any
    dfactor: float
    captures: Any
    tables: tuple[Table, ...]


_SCORE = "s, b, h, q, k, q_ok, k_ok, sizes, aux"
_GRAD = "s, grad, b, h, q, k, q_ok, k_ok, sizes, aux"


def _like_s(writer: _Writer, root: Node) -> str:
    (name,) = writer.write(root)
    if all(_axes(root)):
        return f"return {name}"
    return f"return tl.broadcast_to(tl.cast({name}, tl.float32), s.shape)"


@lru_cache(maxsize=1024)
def phase(program: Program, wrt: tuple[int, ...] = (), fast_bfloat16: bool = False) -> Phase:
    """The device functions of `program`; wrt: the float captures whose gradients are wanted, in the order of daux."""
    root = _canonical(program.root)
    wide = _reaches(root, 1e6)
    inner, factor = (root, 1.0) if wide else _peel(root, -math.inf, positive=True)
    writer = _Writer(program, fast_bfloat16)
    result = _like_s(writer, inner)
    score = _function("score", _SCORE, [*writer.lines, result])

    derivative = vjp(program, wrt)
    dinner, dfactor = _peel(_canonical(derivative.dscore), 0.0, positive=False)
    writer = _Writer(program, fast_bfloat16)
    result = _like_s(writer, dinner)
    dscore = _function("dscore", _GRAD, [*writer.lines, result])

    tables = tuple(_table(program, node, grad, fast_bfloat16) for node, grad in derivative.loads if _is_table(node, derivative.loads))
    rest = [(node, grad) for node, grad in derivative.loads if not _is_table(node, derivative.loads)]
    captures = _captures(program, wrt, rest, fast_bfloat16) if rest else None
    return Phase(score, factor, wide, _reaches(root, 500.0), dscore, dfactor, captures, tables)


_Loads = Sequence[tuple[Node, Node]]


def _captures(program: Program, wrt: tuple[int, ...], loads: _Loads, fast_bfloat16: bool) -> Any:
    """Adds each load's gradient to its buffer: summed over the axes of the tile that the load does not read, then one atomic."""
    writer = _Writer(program, fast_bfloat16)
    first = {c: sum(1 + program.captures[o].rank for o in wrt[:i]) for i, c in enumerate(wrt)}
    for node, grad in loads:
        assert isinstance(node.attr, int)
        _, value = writer.write(node, grad)
        along_q, along_k = _index_axes(node)
        name = writer._assign(f"tl.where(q_ok & k_ok, tl.broadcast_to(tl.cast({value}, tl.float32), s.shape), 0.0)")
        if not along_q:
            name = writer._assign(f"tl.sum({name}, axis=0, keep_dims=True)")
        if not along_k:
            name = writer._assign(f"tl.sum({name}, axis=1, keep_dims=True)")
        pointer = writer.pointer(node, "daux", first[node.attr])
        mask = writer.mask(node)
        if not mask:  # one number: a (1, 1) tile of one lane
            writer.lines.append(f"tl.atomic_add({pointer} + tl.zeros((1, 1), tl.int32), {name}, sem='relaxed')")
        elif _plain_indices(node, loads) == "bhkq":
            writer.lines.append(f"tl.store({pointer}, {name}, mask={mask})")
        else:
            writer.lines.append(f"tl.atomic_add({pointer}, {name}, mask={mask}, sem='relaxed')")
    return _function("captures", _GRAD + ", daux", writer.lines)


def _table(program: Program, node: Node, grad: Node, fast_bfloat16: bool) -> Table:
    writer = _Writer(program, fast_bfloat16)
    result = _like_s(writer, grad)
    assert isinstance(node.attr, int)
    return Table(node.attr, node, _function("gradient", _GRAD, [*writer.lines, result]))


def _is_table(node: Node, loads: _Loads) -> bool:
    return _plain_indices(node, loads) in ("kq", "bkq", "hkq")


def _plain_indices(node: Node, loads: _Loads) -> str | None:
    """The indices read, sorted, if each is read bare and once, beside constants, and no other load reads the capture: then
    different indices are different elements. Else None."""
    if any(i.op not in ("index", "const") for i in node.args) or sum(other.attr == node.attr for other, _ in loads) > 1:
        return None
    names = sorted(str(i.attr) for i in node.args if i.op == "index")
    return "".join(names) if len(set(names)) == len(names) else None


@lru_cache(maxsize=1024)
def bounds(program: Program, over: str) -> Any:
    """The device function of `tiles.kv_bounds` (over="k") or `tiles.q_bounds` (over="q"), or None if nothing can be skipped."""
    found = tiles.kv_bounds(program) if over == "k" else tiles.q_bounds(program)
    if found is None:
        return None
    writer = _Writer(program, fast_bfloat16=False)
    names = writer.write(found.lo, found.hi, found.full_lo, found.full_hi)
    result = ", ".join(f"tl.cast({n}, tl.int32)" for n in names)
    arguments = ("q0, q1" if over == "k" else "k0, k1") + ", b, h, sizes, aux"
    return _function("bounds", arguments, [*writer.lines, f"return {result}"])


# ---------------------------------------------------------------- what the functions are called with


def aux_arguments(program: Program, captures: Sequence[Any], params: Sequence[int]) -> tuple[Any, ...]:
    """The `aux` tuple: the parameters, then each capture's tensor and strides (never empty: Triton has no empty tuple)."""
    flat: list[Any] = list(params)
    for tensor in captures:
        flat += [tensor, *tensor.stride()]
    return tuple(flat) or (0,)


def gradient_arguments(buffers: Sequence[Any]) -> tuple[Any, ...]:
    """The `daux` tuple: each gradient buffer and its strides."""
    flat: list[Any] = []
    for tensor in buffers:
        flat += [tensor, *tensor.stride()]
    return tuple(flat) or (0,)

