"""The nodes of a score program: leaves, operations, and builders that simplify what is exact in IEEE arithmetic."""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from .folds import FOLDS, exact

__all__ = [
    "GRAD", "INDICES", "LEAVES", "OPS", "SCORE", "SIZES", "Node", "apply", "const", "index", "load", "param", "postorder",
    "rebuild", "size",
]  # fmt: skip

# Leaves. attr: const -> value; index -> one of "b h q k" (the element) or "q0 q1 k0 k1" (first, last of a tile);
# size -> "B H N M"; param -> position; load -> capture position (args: one int node per dim of the capture);
# grad -> none (the cotangent of the result, in derivative expressions only).
LEAVES = frozenset({"const", "score", "index", "size", "param", "load", "grad"})
SIZES = ("B", "H", "N", "M")
INDICES = ("b", "h", "q", "k", "q0", "q1", "k0", "k1")

# op -> (number of arguments, kind of the result); "same" is the kind of the last argument.
OPS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("add", "sub", "mul", "maximum", "minimum"), (2, "same")),  # maximum/minimum propagate NaN
    **dict.fromkeys(("neg", "abs"), (1, "same")),
    **dict.fromkeys(("div", "pow"), (2, "float")),
    **dict.fromkeys(
        ("exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "erf", "floor", "ceil", "trunc", "log1p", "expm1"),
        (1, "float"),
    ),
    **dict.fromkeys(("floordiv", "mod"), (2, "int")),  # Python's rounding (towards -inf); divisor > 0
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor"), (2, "bool")),
    "not": (1, "bool"),
    "isnan": (1, "bool"),
    "isinf": (1, "bool"),
    "where": (3, "same"),
    "to_float": (1, "float"),  # from int or bool
    "to_int": (1, "int"),  # from float (towards zero) or bool
    "to_bool": (1, "bool"),  # != 0
    "round_float16": (1, "float"),  # round to the 16-bit format and back: keeps -1e9 -> -inf of a half mask
    "round_bfloat16": (1, "float"),
}


@dataclass(frozen=True, eq=False)
class Node:
    """One definition. Nodes are interned: equal nodes are the same object, so ``is`` compares expressions."""

    op: str
    args: tuple[Node, ...] = ()
    attr: object = None
    kind: str = "float"

    _table = {}  # noqa: RUF012 - the intern table, not a field

    @staticmethod
    def make(op: str, *args: Node, attr: object = None, kind: str | None = None) -> Node:
        if kind is None:
            kind = _kind(op, args, attr)
        key = (op, args, type(attr), repr(attr) if isinstance(attr, float) else attr, kind)
        node = Node._table.get(key)
        if node is None:
            node = Node._table[key] = Node(op, args, attr, kind)
        return node

    def __repr__(self) -> str:
        inner = [*([repr(self.attr)] if self.attr is not None else []), *map(repr, self.args)]
        return f"{self.op}({', '.join(inner)})"

    @cached_property
    def leaves(self) -> frozenset[Node]:
        """Every leaf below (a load counts, and so do the leaves of its index)."""
        own = {self} if self.op in LEAVES else set()
        return frozenset(own.union(*(a.leaves for a in self.args))) if self.args else frozenset(own)

    def depends_on(self, *names: str) -> bool:
        """Whether any index variable of `names` (or "score") is read below."""
        return any(n.attr in names if n.op == "index" else n.op in names for n in self.leaves)


def _kind(op: str, args: tuple[Node, ...], attr: object) -> str:
    if op == "const":
        return {bool: "bool", int: "int", float: "float"}[type(attr)]
    if op in ("index", "size", "param"):
        return "int"
    if op in ("score", "grad"):
        return "float"
    if op not in OPS:
        raise ValueError(f"fusion_kernels: unknown operation {op!r} in a score program; known: {', '.join(sorted(OPS))}")
    arity, kind = OPS[op]
    if len(args) != arity:
        raise ValueError(f"fusion_kernels: {op!r} takes {arity} arguments in a score program, got {len(args)}")
    return args[-1].kind if kind == "same" else kind


# ---------------------------------------------------------------- builders (constant folding that is exact in IEEE arithmetic)


def const(value: float | int | bool) -> Node:
    return Node.make("const", attr=value)


def _fold(op: str, *args: Node) -> Node | None:
    """Exact simplifications only: 0 * x, x - x and reassociation of floats are left alone (inf, NaN)."""
    a = args[0]
    b = args[1] if len(args) > 1 else None
    values = [x.attr for x in args]
    if all(x.op == "const" for x in args) and op in FOLDS:
        try:
            value = FOLDS[op](*values)
        except (ValueError, ZeroDivisionError, OverflowError):
            return None
        kind = _kind(op, args, None)
        return const({"float": float, "int": int, "bool": bool}[kind](value))
    is_const = [x.op == "const" for x in args]
    if op in ("add", "sub") and (made := _distributed(op, args)) is not None:
        return made
    if op == "add" and b is not None:  # 0 + x is x but for 0 + (-0), a sign; of constants that are chosen it stays
        if is_const[1] and b.attr == 0 and not isinstance(b.attr, bool) and _chosen(a) is None:
            return a
        if is_const[0] and a.attr == 0 and not isinstance(a.attr, bool) and _chosen(b) is None:
            return b
    if op == "sub" and is_const[1] and values[1] == 0:
        return a
    if op in ("mul", "div", "floordiv") and is_const[1] and values[1] == 1 and b is not None and b.kind == a.kind:
        return a
    if op == "mul" and is_const[0] and values[0] == 1 and b is not None and b.kind == a.kind:
        return b
    if op == "mul" and a.kind == "int" and 0 in [v for v, c in zip(values, is_const, strict=True) if c]:
        return const(0)
    if op == "where":
        return _where(*args)
    if op in ("lt", "le", "gt", "ge") and a.op == "index" and is_const[1] and values[1] <= -(op in ("le", "gt")):  # type: ignore[operator]
        return const(op in ("gt", "ge"))  # no index is negative: transformers writes q >= 0 for "no structure"
    if op in ("and", "or") and b is not None:
        for x, other in ((a, b), (b, a)):
            if x.op == "const":
                return (other if x.attr else x) if op == "and" else (x if x.attr else other)
        if a is b:
            return a
    if op == "xor" and b is not None and "const" in (a.op, b.op):
        flag, other = (a, b) if a.op == "const" else (b, a)
        return apply("not", other) if flag.attr else other
    if op == "not" and a.op == "not":
        return a.args[0]
    if op == "to_bool" and a.kind == "bool":
        return a
    if op == "to_bool" and a.op in ("to_float", "to_int") and a.args[0].kind == "bool":
        return a.args[0]
    if op == "to_int" and a.kind == "int":
        return a
    if op == "to_float" and a.kind == "float":
        return a
    if op == "sub" and b is not None and b.kind == "float" and "const" not in (a.op, b.op) and _chosen(b) is not None:
        return apply("add", a, apply("neg", b))  # a - b is a + (-b), bit by bit: of a mask that is subtracted, one that is added
    return _distributed(op, args)


def _where(p: Node, a: Node, b: Node) -> Node:
    """``where(p, a, b)``, simpler: constants for `p`, choices of bools, and what `p` decides in its branches."""
    if p.op == "const":
        return a if p.attr else b
    if p.op == "not":
        return apply("where", p.args[0], b, a)
    a, b = _known(p, True, a), _known(p, False, b)
    if a is b:
        return a
    if a.kind != "bool" or "const" not in (a.op, b.op):
        return Node.make("where", p, a, b)
    if a.op == "const":
        return apply("or", p, b) if a.attr else apply("and", apply("not", p), b)
    return apply("or", apply("not", p), a) if b.attr else apply("and", p, a)


def _known(p: Node, holds: bool, x: Node) -> Node:
    """`x` where `p` is known to hold or not. Constants alone go: another branch that is not taken may make a gradient NaN."""
    choice = _chosen(x)
    if choice is not None and choice[0] is p:
        return choice[1] if holds else choice[2]
    return const(holds) if x is p else x


def _chosen(x: Node) -> tuple[Node | None, Node, Node] | None:
    """`x` as (p, a, b): the constant a where p holds, else the constant b; p is None of a constant. None: it is no choice."""
    if x.op == "const":
        return None, x, x
    if x.op == "where" and x.args[1].op == x.args[2].op == "const":
        return x.args[0], x.args[1], x.args[2]
    if x.op in ("to_float", "to_int") and x.args[0].kind == "bool":
        p, one = x.args[0], const(1.0 if x.op == "to_float" else 1)
        zero = const(0.0 if x.op == "to_float" else 0)
        return (p.args[0], zero, one) if p.op == "not" else (p, one, zero)
    return None


def _distributed(op: str, args: tuple[Node, ...]) -> Node | None:
    """``op(where(p, a, b), c)`` as ``where(p, op(a, c), op(b, c))``, of constants a, b, c, where no value changes by a bit.

    So a mask is one condition however it is written: ``tril(ones) == 0``, ``(1 - tril(ones)) * -1e9``, ``log(tril(ones))``.
    """
    choices = [c for x in args if (c := _chosen(x)) is not None]
    conditions = {p for p, _, _ in choices if p is not None}
    if len(choices) < len(args) or len(conditions) != 1:
        return None
    (p,) = conditions
    values = [exact(op, [c[branch].attr for c in choices]) for branch in (1, 2)]  # type: ignore[misc]
    return None if None in values else apply("where", p, *map(const, values))  # type: ignore[arg-type]


def apply(op: str, *args: Node) -> Node:
    """The node ``op(*args)``, folded where that changes no bit of any value."""
    folded = _fold(op, *args) if args else None
    return folded if folded is not None else Node.make(op, *args)


# ---------------------------------------------------------------- walks


def postorder(*roots: Node) -> Iterator[Node]:
    """Each node below the roots once, arguments first; iterative, so a deep expression does not hit the recursion limit."""
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if a not in seen)


def rebuild(root: Node, replace: Callable[[Node, tuple[Node, ...]], Node | None]) -> Node:
    """`root` with every node rebuilt bottom-up; `replace(node, new_args)` may return a substitute, or None to keep it."""
    done: dict[Node, Node] = {}
    for node in postorder(root):
        args = tuple(done[a] for a in node.args)
        new = replace(node, args)
        if new is None:
            new = (
                node
                if args == node.args
                else (Node.make(node.op, *args, attr=node.attr, kind=node.kind) if node.op in LEAVES else apply(node.op, *args))
            )
        done[node] = new
    return done[root]


# ---------------------------------------------------------------- leaves


def load(capture: int, kind: str, index: Iterable[Node]) -> Node:
    """Element ``capture[index]``; every index must be inside the tensor for every (b, h, q, k)."""
    return Node.make("load", *index, attr=capture, kind=kind)


def index(name: str) -> Node:
    return Node.make("index", attr=name)


def size(name: str) -> Node:
    return Node.make("size", attr=name)


def param(i: int) -> Node:
    return Node.make("param", attr=i)


SCORE = Node.make("score")
GRAD = Node.make("grad")
