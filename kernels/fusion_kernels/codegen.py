"""Score program -> @triton.jit functions.

A kernel gets them as constexpr arguments and calls them on a tile; the same source compiles inside any Triton kernel, in
Gluon, and in Triton's interpreter:

    score(s, b, h, q, k, q_ok, k_ok, sizes, aux)             -> x, the shape of s
    dscore(s, grad, b, h, q, k, q_ok, k_ok, sizes, aux)      -> d(loss)/d(s), given grad = d(loss)/d(x)
    captures(s, grad, ..., aux, daux)                        -> adds d(loss)/d(captures) to the buffers of daux
    bounds(q0, q1, b, h, sizes, aux)                         -> the four ends of `tiles.Bounds`; (k0, k1, ...) for query ranges
    key_mask(b, h, k, k_ok, sizes, aux)                      -> `tiles.key_mask`, a bool the shape of k
    pair_mask(b, h, q, k, q_ok, k_ok, sizes, aux)            -> (alive, plain) of `tiles.pair_mask`, bools that broadcast
    sink(b, h, q, q_ok, sizes, aux)                          -> the program's sink, the shape of q
    sink_captures(grad, b, h, q, ..., aux, daux)             -> adds d(loss)/d(what the sink reads), given d(loss)/d(sink)
    weight(s, b, h, q, k, ...), dweight(s, grad, ...), weight_captures(s, grad, ..., aux, daux)
                                                             -> as score, dscore and captures, of probabilities s (`weights`)

q and k are int32 indices that broadcast against s ((BLOCK_M, 1) and (1, BLOCK_N), or transposed), q_ok and k_ok say which
of them are inside the tensors (or are the constexpr True), sizes is (B, H, N, M), and aux holds the integer parameters and
then, for each capture, its pointer and its strides; for bounds, what `key_ranges` or `pair_ranges` found comes last. An
expression is computed at the shape of what it reads: a value that depends on the row alone costs one operation a row.

The source is registered in `linecache` under a hash of itself, because Triton reads the source of what it compiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import tiles
from .derivative import vjp
from .peel import canonical, peel, reaches
from .program import Node, Program
from .source import Writer, axes, function, index_axes

__all__ = [
    "PairMask", "Phase", "Sink", "Table", "Weight", "aux_arguments", "bounds", "gradient_arguments", "key_mask", "pair_mask",
    "phase", "sink", "weight",
]  # fmt: skip

# ---------------------------------------------------------------- the functions of a program


@dataclass(frozen=True)
class Table:
    """A load at (q, k) of a table, which all batches (all_b) or heads (all_h) may share, and its gradient on a tile.

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

    def covers(self, shape: Sequence[int], sizes: tuple[int, int, int, int]) -> bool:
        """Whether the load reads each element of a capture of this shape; sizes: B, H, N, M."""
        lengths = dict(zip("bhqk", sizes, strict=True))
        return all(n == (lengths[str(i.attr)] if i.op == "index" else 1) for n, i in zip(shape, self.load.args, strict=True))


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


def _like_s(writer: Writer, root: Node) -> str:
    (name,) = writer.write(root)
    if all(axes(root)):
        return f"return {name}"
    return f"return tl.broadcast_to(tl.cast({name}, tl.float32), s.shape)"


@lru_cache(maxsize=1024)
def phase(program: Program, wrt: tuple[int, ...] = (), fast_bfloat16: bool = False, wide: bool = False) -> Phase:
    """The device functions of `program`; wrt: the float captures whose gradients are wanted, in the order of daux.

    wide: whether to take it for wide, whatever it reads.
    """
    root = canonical(program.root)
    wide = wide or reaches(root, 1e6)
    inner, factor = (root, 1.0) if wide else peel(root, -math.inf, positive=True)
    writer = Writer(program, fast_bfloat16)
    result = _like_s(writer, inner)
    score = function("score", _SCORE, [*writer.lines, result])

    derivative = vjp(program, wrt)
    dinner, dfactor = peel(canonical(derivative.dscore), 0.0, positive=False)
    writer = Writer(program, fast_bfloat16)
    result = _like_s(writer, dinner)
    dscore = function("dscore", _GRAD, [*writer.lines, result])

    every = (*derivative.loads, *_loads(program.sink_program, wrt), *_loads(program.weight_program, wrt))
    tables = tuple(_table(program, node, grad, fast_bfloat16) for node, grad in derivative.loads if _is_table(node, every))
    rest = [(node, grad) for node, grad in derivative.loads if not _is_table(node, every)]
    captures = _captures(program, wrt, rest, fast_bfloat16) if rest else None
    return Phase(score, factor, wide, reaches(root, 500.0), dscore, dfactor, captures, tables)


_Loads = Sequence[tuple[Node, Node]]


def _captures(program: Program, wrt: tuple[int, ...], loads: _Loads, fast_bfloat16: bool, name: str = "captures") -> Any:
    """Adds each load's gradient to its buffer: summed over the axes of the tile that the load does not read, then one atomic."""
    writer, first = Writer(program, fast_bfloat16), _buffers(program, wrt)
    for node, grad in loads:
        assert isinstance(node.attr, int)
        _, value = writer.write(node, grad)
        along_q, along_k = index_axes(node)
        total = writer.assign(f"tl.where(q_ok & k_ok, tl.broadcast_to(tl.cast({value}, tl.float32), s.shape), 0.0)")
        if not along_q:
            total = writer.assign(f"tl.sum({total}, axis=0, keep_dims=True)")
        if not along_k:
            total = writer.assign(f"tl.sum({total}, axis=1, keep_dims=True)")
        pointer = writer.pointer(node, "daux", first[node.attr])
        mask = writer.mask(node)
        if not mask:  # one number: a (1, 1) tile of one lane
            writer.lines.append(f"tl.atomic_add({pointer} + tl.zeros((1, 1), tl.int32), {total}, sem='relaxed')")
        else:
            writer.lines.append(f"tl.atomic_add({pointer}, {total}, mask={mask}, sem='relaxed')")
    return function(name, _GRAD + ", daux", writer.lines)


def _buffers(program: Program, wrt: tuple[int, ...]) -> dict[int, int]:
    """Where in daux each capture's buffer is."""
    return {c: sum(1 + program.captures[o].rank for o in wrt[:i]) for i, c in enumerate(wrt)}


def _loads(program: Program | None, wrt: tuple[int, ...]) -> _Loads:
    return () if program is None else vjp(program, wrt).loads


@dataclass(frozen=True)
class Sink:
    """A program's sink as device functions of rows, tensors of one dim.

    value: the sink's score.
    captures: adds the gradients of what it reads; None where none is needed.
    """

    value: Any
    captures: Any


@lru_cache(maxsize=1024)
def sink(program: Program, wrt: tuple[int, ...] = (), fast_bfloat16: bool = False) -> Sink | None:
    """The device functions of the sink of `program`, or None; wrt: as for `phase`."""
    if program.sink is None:
        return None
    writer = Writer(program, fast_bfloat16)
    (name,) = writer.write(program.sink)
    result = f"return tl.broadcast_to(tl.cast({name}, tl.float32), q.shape)"
    value = function("sink", "b, h, q, q_ok, sizes, aux", [*writer.lines, result])
    loads = _loads(program.sink_program, wrt)
    return Sink(value, _sink_captures(program, wrt, loads, fast_bfloat16) if loads else None)


def _sink_captures(program: Program, wrt: tuple[int, ...], loads: _Loads, fast_bfloat16: bool) -> Any:
    """As `_captures`: one atomic a tile, or one a row."""
    writer, first = Writer(program, fast_bfloat16), _buffers(program, wrt)
    for node, grad in loads:
        assert isinstance(node.attr, int)
        _, value = writer.write(node, grad)
        name = writer.assign(f"tl.where(q_ok, tl.broadcast_to(tl.cast({value}, tl.float32), q.shape), 0.0)")
        pointer = writer.pointer(node, "daux", first[node.attr])
        if index_axes(node)[0]:
            writer.lines.append(f"tl.atomic_add({pointer}, {name}, mask=q_ok, sem='relaxed')")
        else:
            writer.lines.append(f"tl.atomic_add({pointer}, tl.sum({name}, axis=0), sem='relaxed')")
    return function("sink_captures", "grad, b, h, q, q_ok, sizes, aux, daux", writer.lines)


@dataclass(frozen=True)
class Weight:
    """A program's weight as device functions of a tile of probabilities.

    value: what the values are multiplied with. gradient: the cotangent of the probabilities, given that of ``value``.
    captures: adds the gradients of what it reads; None where none is needed.
    """

    value: Any
    gradient: Any
    captures: Any


@lru_cache(maxsize=1024)
def weight(program: Program, wrt: tuple[int, ...] = (), fast_bfloat16: bool = False) -> Weight | None:
    """The device functions of the weight of `program`, or None; wrt: as for `phase`."""
    own = program.weight_program
    if own is None:
        return None
    writer, derivative = Writer(program, fast_bfloat16), vjp(own, wrt)
    result = _like_s(writer, own.root)
    value = function("weight", _SCORE, [*writer.lines, result])
    writer = Writer(program, fast_bfloat16)
    result = _like_s(writer, derivative.dscore)
    gradient = function("dweight", _GRAD, [*writer.lines, result])
    loads = derivative.loads
    return Weight(value, gradient, _captures(program, wrt, loads, fast_bfloat16, "weight_captures") if loads else None)


def _table(program: Program, node: Node, grad: Node, fast_bfloat16: bool) -> Table:
    writer = Writer(program, fast_bfloat16)
    result = _like_s(writer, grad)
    assert isinstance(node.attr, int)
    return Table(node.attr, node, function("gradient", _GRAD, [*writer.lines, result]))


def _is_table(node: Node, loads: _Loads) -> bool:
    return _plain_indices(node, loads) in ("kq", "bkq", "hkq", "bhkq")


def _plain_indices(node: Node, loads: _Loads) -> str | None:
    """The indices read, sorted, if each is read bare and once, beside constants, and no other load reads the capture: then
    different indices are different elements. Else None."""
    if any(i.op not in ("index", "const") for i in node.args) or sum(other.attr == node.attr for other, _ in loads) > 1:
        return None
    names = sorted(str(i.attr) for i in node.args if i.op == "index")
    return "".join(names) if len(set(names)) == len(names) else None


@lru_cache(maxsize=1024)
def bounds(program: Program, over: str, keys: bool = False, pairs: bool = False) -> Any:
    """The device function of `tiles.kv_bounds` (over="k") or `tiles.q_bounds` (over="q"), or None if nothing can be skipped.

    keys: narrowed by the ranges of live keys, a tensor and two strides at the end of aux (`key_ranges`).
    pairs: looked up in what is there instead (`pair_ranges`).
    """
    if pairs:
        ranges = ", ".join(f"aux[{_behind(program) + i}]" for i in range(5))
        return function("bounds", f"{_TILE[over]}, b, h, sizes, aux", [f"return device.{_LOOKUP[over]}, b, h, sizes, {ranges})"])
    found = tiles.kv_bounds(program) if over == "k" else tiles.q_bounds(program)
    keys = keys and tiles.key_mask(program) is not None
    if found is None and not keys:
        return None
    found = found or tiles.no_bounds(program, over)
    writer = Writer(program, fast_bfloat16=False)
    names = writer.write(found.lo, found.hi, found.full_lo, found.full_hi)
    result = ", ".join(f"tl.cast({n}, tl.int32)" for n in names)
    if keys:
        first = _behind(program)
        ranges = f"aux[{first}] + b * aux[{first + 1}] + h * aux[{first + 2}]"
        helper = "keys_inside(" if over == "k" else "queries_of_keys(k0, k1, "
        result = f"device.{helper}{result}, {ranges})"
    return function("bounds", f"{_TILE[over]}, b, h, sizes, aux", [*writer.lines, f"return {result}"])


_TILE = {"k": "q0, q1", "q": "k0, k1"}
_LOOKUP = {"k": "keys_of_pairs(q0, q1", "q": "queries_of_pairs(k0, k1"}


def _behind(program: Program) -> int:
    """Where in aux the ranges are: behind all that `aux_arguments` has."""
    return program.params + sum(1 + c.rank for c in program.captures)


@lru_cache(maxsize=1024)
def key_mask(program: Program) -> Any:
    """The device function of `tiles.key_mask`, or None: no tensor decides about whole keys."""
    alive = tiles.key_mask(program)
    if alive is None:
        return None
    writer = Writer(program, fast_bfloat16=False)
    (name,) = writer.write(alive)
    return function("key_mask", "b, h, k, k_ok, sizes, aux", [*writer.lines, f"return {name}"])


@dataclass(frozen=True)
class PairMask:
    """`tiles.pair_mask` as a device function, what it tells apart, and the bounds of structure alone (None: there are none)."""

    function: Any
    by_b: bool
    by_h: bool
    bounds: Any


@lru_cache(maxsize=1024)
def pair_mask(program: Program, wrt: tuple[int, ...] = (), fast_bfloat16: bool = False) -> PairMask | None:
    """The device function of `tiles.pair_mask`, or None: no tensor decides about pairs. wrt, fast_bfloat16: as for `phase`."""
    mask = tiles.pair_mask(program, wrt)
    if mask is None:
        return None
    writer = Writer(program, fast_bfloat16)
    alive, plain = writer.write(mask.alive, mask.plain)
    value = function("pair_mask", "b, h, q, k, q_ok, k_ok, sizes, aux", [*writer.lines, f"return {alive}, {plain}"])
    return PairMask(value, mask.depends_on("b"), mask.depends_on("h"), bounds(program, "k"))


# ---------------------------------------------------------------- what the functions are called with


def aux_arguments(
    program: Program, captures: Sequence[Any], params: Sequence[int], of: Callable[[Any], Any] | None = None
) -> tuple[Any, ...]:
    """The `aux` tuple: the parameters, then each capture's tensor and strides (never empty: Triton has no empty tuple).

    of: what is passed for a tensor (`Launch.of`).
    """
    return _flat([*params], captures, of)


def gradient_arguments(buffers: Sequence[Any], of: Callable[[Any], Any] | None = None) -> tuple[Any, ...]:
    """The `daux` tuple: each gradient buffer and its strides."""
    return _flat([], buffers, of)


def _flat(flat: list[Any], tensors: Sequence[Any], of: Callable[[Any], Any] | None) -> tuple[Any, ...]:
    for tensor in tensors:
        flat += [of(tensor) if of is not None else tensor, *tensor.stride()]
    return tuple(flat) or (0,)
