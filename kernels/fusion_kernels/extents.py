"""Which elements of its captured tensors a score program reads, as far as its text and the sizes of a call say.

A load is read at every (b, h, q, k), so an index outside the tensor is an error even where a ``where`` discards the value. The
ends of an index expression are found by interval arithmetic, which is exact where no index variable comes twice::

    a x + b y + c    a lo(x) or a hi(x), by the sign of a, and so on     x // d, max(x, y), min(x, y)    their ends, of the ends
    |x|              hi: the larger of |lo(x)| and |hi(x)|; lo: known where x does not change its sign

Anything else (``mod``, ``where``, indices that tensors hold) has ends that are not known, and is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .program import Node, Program, postorder
from .ranges import linear

__all__ = ["Extent", "extents"]

Ends = tuple[int | None, int | None]  # the least and the largest value that is taken; None: not known
_SIZE_OF = {"b": 0, "h": 1, "q": 2, "k": 3, "B": 0, "H": 1, "N": 2, "M": 3}


@dataclass(frozen=True)
class Extent:
    """captures[capture] is read from `first` to `last` (None: not known) along `dim`, at the index expression `at`."""

    capture: int
    dim: int
    first: int | None
    last: int | None
    at: str


def extents(program: Program, sizes: Sequence[object], params: Sequence[int]) -> tuple[Extent, ...]:
    """What `program` reads in a call.

    Args:
        sizes: B, H, N, M; one that is not an int (a symbol of a compiler) is taken as not known, and never compared.
        params: as many as the program reads.
    """
    known = tuple([s if type(s) is int else None for s in sizes])
    return _extents(program, known, tuple(params) if _moved(program) else ())


@lru_cache(maxsize=1024)
def _moved(program: Program) -> bool:
    """Whether a parameter moves where a capture is read."""
    return any(leaf.op == "param" for load in _loads(program) for a in load.args for leaf in a.leaves)


def _loads(program: Program) -> list[Node]:
    roots = (program.root,) if program.sink is None else (program.root, program.sink)
    return [n for n in postorder(*roots) if n.op == "load"]


@lru_cache(maxsize=1024)
def _extents(program: Program, sizes: tuple[int | None, ...], params: tuple[int, ...]) -> tuple[Extent, ...]:
    found = []
    for load in _loads(program):
        if any(sizes[i] == 0 for i in (0, 1, 2)) or (sizes[3] == 0 and load.depends_on("k")):
            continue  # nothing is read
        for dim, at in enumerate(load.args):
            first, last = _ends(at, sizes, params)
            if first is not None or last is not None:
                found.append(Extent(int(load.attr), dim, first, last, _written(at)))  # type: ignore[call-overload]
    return tuple(found)


def _ends(node: Node, sizes: tuple[int | None, ...], params: tuple[int, ...]) -> Ends:
    if node.op == "const" and type(node.attr) is int:
        return node.attr, node.attr
    if node.op == "param":
        value = params[int(node.attr)] if type(params[int(node.attr)]) is int else None  # type: ignore[call-overload]
        return value, value
    if node.op in ("index", "size"):
        n = sizes[_SIZE_OF[node.attr]] if node.attr in _SIZE_OF else None  # type: ignore[index]
        return (n, n) if node.op == "size" else (0, None if n is None else n - 1)
    if node.op in ("add", "sub", "neg", "mul"):
        return _sum(node, sizes, params)
    if node.op == "floordiv":
        low, high = _ends(node.args[1], sizes, params)
        if low is None or low != high or low < 1:
            return None, None
        a, b = _ends(node.args[0], sizes, params)
        return (None if a is None else a // low), (None if b is None else b // low)
    if node.op in ("minimum", "maximum") and _apart(node.args):
        (a, b), (c, d) = (_ends(x, sizes, params) for x in node.args)
        of = min if node.op == "minimum" else max
        return (None if a is None or c is None else of(a, c)), (None if b is None or d is None else of(b, d))
    if node.op == "abs":
        a, b = _ends(node.args[0], sizes, params)
        if a is None or b is None:
            return None, None
        return (None if a < 0 < b else min(abs(a), abs(b))), max(abs(a), abs(b))
    return None, None


def _sum(node: Node, sizes: tuple[int | None, ...], params: tuple[int, ...]) -> Ends:
    found = linear(node)
    if found is None or node in found[0] or not _apart(tuple(found[0])):
        return None, None
    terms, rest = found
    first: int | None = rest
    last: int | None = rest
    for term, c in terms.items():
        a, b = _ends(term, sizes, params)
        a, b = (a, b) if c > 0 else (b, a)
        first = None if first is None or a is None else first + c * a
        last = None if last is None or b is None else last + c * b
    return first, last


def _apart(nodes: Sequence[Node]) -> bool:
    """Whether no index variable is read by two of the nodes: then each takes its ends whatever the others do."""
    read = [leaf for node in nodes for leaf in node.leaves if leaf.op == "index"]
    return len(read) == len(set(read))


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//"}


def _written(node: Node) -> str:
    """An index expression as one would write it."""
    if node.op in ("const", "index", "size"):
        return str(node.attr)
    if node.op == "param":
        return f"params[{node.attr}]"
    args = [_written(a) for a in node.args]
    if node.op in _SIGNS:
        a, b = (f"({text})" if arg.op in _SIGNS and node.op != "add" else text for text, arg in zip(args, node.args, strict=True))
        return f"{a} {_SIGNS[node.op]} {b}"
    return f"{node.op}({', '.join(args)})"
