"""The score program: what happens to a score between ``q @ k.T`` and the softmax, as a small immutable expression.

A program is a pure function ``f(s; b, h, q, k, captured tensors, integer parameters)`` of one raw dot product
``s = sum_d q[b, h, q, d] * k[b, h, k, d]``. It is written down once and read by many: the dense torch evaluation
(`evaluate`), the Triton source (`codegen`), the gradient (`derivative`), the tile bounds (`tiles`) and the report.

Text form, definitions with ``; `` (or a line break) between them, the last one is the result (same text = same kernel)::

    captures float[2] bool[2]; params 1; %0 = score; %1 = const 0.125; %2 = mul %0 %1; ...

Every node has a kind: ``float`` (evaluated in fp32, or fp64 for fp64 inputs), ``int`` or ``bool``.

A program may have a *sink*, a score z(b, h, q; captured tensors) that takes its part of each row's softmax and has no value::

    p_k = exp(x_k) / (exp(z) + sum_k exp(x_k))

The last line of its text is ``sink %x %z``.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from .folds import FOLDS, exact

__all__ = ["LEAVES", "OPS", "SIZES", "Capture", "Node", "Program", "parse", "postorder"]

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
        return made  # first, for 0 + (-0) is 0, and what follows takes 0 + x for x
    if op == "add" and b is not None:
        if is_const[1] and b.attr == 0 and not isinstance(b.attr, bool):
            return a
        if is_const[0] and a.attr == 0 and not isinstance(a.attr, bool):
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


# ---------------------------------------------------------------- programs


@dataclass(frozen=True)
class Capture:
    """A captured tensor as the program sees it. kind: "float", "int" or "bool"; rank: number of dims (0 to 6)."""

    kind: str
    rank: int


_OF_ROWS = ("zero_rows", "inf_rows")  # what the text says beside the parameters


@dataclass(frozen=True)
class Program:
    """A score program: the result node, what it captures, and how many integer parameters it reads.

    zero_rows: a row whose scores are all -inf gives zeros, with lse = +inf, as torch's safe softmax; otherwise NaN, as softmax.
    sink: a float of b, h, q and captures, in no reach of score and k; None: the keys share each row among themselves. Where it
        is there, a row of ``zero_rows`` is the sink's (lse = z), and is NaN only if the sink is -inf as well, as the softmax of
        scores and sink together.
    inf_rows: a row whose largest score is +inf has lse = +inf, as exp(x - logsumexp(x)) has: its probabilities are NaN where the
        score is +inf, and 0 elsewhere; otherwise NaN throughout, with lse = NaN, as softmax. The output is NaN either way.

    Raises:
        ValueError: the sink reads the score or k.
    """

    root: Node
    captures: tuple[Capture, ...] = ()
    params: int = 0
    zero_rows: bool = False
    sink: Node | None = None
    inf_rows: bool = False

    def __post_init__(self) -> None:
        if self.sink is not None and (self.sink.kind != "float" or self.sink.depends_on("score", "grad", "k")):
            raise ValueError(
                f"fusion_kernels: the sink of a score program is {self.sink}; needed: a float of b, h, q and captures"
            )

    @cached_property
    def text(self) -> str:
        """The canonical text: two programs that compute the same expression from the same captures have the same text."""
        lines = ["captures " + " ".join(f"{c.kind}[{c.rank}]" for c in self.captures) if self.captures else "captures"]
        lines.append(" ".join([f"params {self.params}", *(name for name in _OF_ROWS if getattr(self, name))]))
        names: dict[Node, str] = {}
        for node in postorder(self.root, *self._sinks):
            parts = [node.op]
            if node.attr is not None:
                parts.append(str(node.attr) if node.op in ("index", "size") else repr(node.attr))
            parts += [names[a] for a in node.args]
            names[node] = f"%{len(names)}"
            lines.append(f"{names[node]} = {' '.join(parts)}")
        if self.sink is not None:
            lines.append(f"sink {names[self.root]} {names[self.sink]}")
        return "; ".join(lines)  # one line: compilers put constant arguments into comments of the code that they write

    @cached_property
    def loads(self) -> tuple[Node, ...]:
        """Every load, in the order of the text."""
        return tuple(n for n in postorder(self.root) if n.op == "load")

    @property
    def _sinks(self) -> tuple[Node, ...]:
        return () if self.sink is None else (self.sink,)

    def with_root(self, root: Node) -> Program:
        return replace(self, root=root)

    @cached_property
    def sink_program(self) -> Program | None:
        """The sink as the root of a program of its own, for its gradient."""
        return None if self.sink is None else Program(self.sink, self.captures, self.params)


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


def _value(text: str) -> float | int | bool:
    if text in ("True", "False"):
        return text == "True"
    if text in ("inf", "-inf", "nan"):
        return float(text)
    return float(text) if any(c in text for c in ".en") else int(text)


@lru_cache(maxsize=1024)
def parse(text: str) -> Program:
    """The program written in `text`.

    Raises:
        ValueError: the text is not a score program; the message names the line.
    """
    lines = [line.strip() for line in text.strip().replace("\n", ";").split(";")]
    if len(lines) < 3 or not lines[0].startswith("captures") or not lines[1].startswith("params "):
        raise ValueError(f"fusion_kernels: a score program starts with 'captures' and 'params' lines, got {text[:80]!r}")
    captures = []
    for word in lines[0].split()[1:]:
        kind, _, rank = word.rstrip("]").partition("[")
        captures.append(Capture(kind, int(rank)))
    nodes: dict[str, Node] = {}
    last = sink = None
    _, params, *of_rows = lines[1].split()
    if not set(of_rows) <= set(_OF_ROWS):
        known = ", ".join(_OF_ROWS)
        raise ValueError(f"fusion_kernels: cannot read {lines[1]!r} of a score program: after the number come any of {known}")
    for line in lines[2:]:
        try:
            if line.startswith("sink "):
                last, sink = (nodes[word] for word in line.split()[1:])
                continue
            name, _, body = line.partition(" = ")
            op, *words = body.split()
            args = tuple(nodes[w] for w in words if w.startswith("%"))
            attrs = [w for w in words if not w.startswith("%")]
            attr: object = None
            if op in ("index", "size"):
                attr = attrs[0].strip("'")
            elif op == "const":
                attr = _value(attrs[0])
            elif attrs:
                attr = int(attrs[0])
            kind = captures[attr].kind if op == "load" and isinstance(attr, int) else None
            last = nodes[name] = Node.make(op, *args, attr=attr, kind=kind)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"fusion_kernels: cannot read {line!r} of a score program: {error}") from error
    assert last is not None
    return Program(last, tuple(captures), int(params), "zero_rows" in of_rows, sink, "inf_rows" in of_rows)


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
