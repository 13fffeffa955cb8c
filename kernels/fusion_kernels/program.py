"""The score program: what happens to a score between ``q @ k.T`` and the softmax, as a small immutable expression.

A program is a pure function ``f(s; b, h, q, k, captured tensors, integer parameters)`` of one raw dot product
``s = sum_d q[b, h, q, d] * k[b, h, k, d]``. It is written down once and read by many: the dense torch evaluation
(`evaluate`), the Triton source (`codegen`), the gradient (`derivative`), the tile bounds (`tiles`) and the report.

Text form, definitions with ``; `` (or a line break) between them, the last one is the result (same text = same kernel)::

    captures float[2] bool[2]; params 1; %0 = score; %1 = const 0.125; %2 = mul %0 %1; ...

Every node has a kind: ``float`` (evaluated in fp32, or fp64 for fp64 inputs), ``int`` or ``bool``.

A program may have a *sink*, a score z(b, h, q; captured tensors) that takes its part of each row's softmax and has no value::

    p_k = exp(x_k) / (exp(z) + sum_k exp(x_k))

The last line of its text is then ``sink %x %z``. It may also have a *weight*, linear in the probability, that stands between this
and the values (`weights`)::

    o = sum_k w(p_k; b, h, q, k, captured tensors) v_k

The last line of its text is then ``weight %x %w``, in which ``score`` is the probability.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from .nodes import (
    GRAD,
    INDICES,
    LEAVES,
    OPS,
    SCORE,
    SIZES,
    Node,
    apply,
    const,
    index,
    load,
    param,
    postorder,
    rebuild,
    size,
)  # fmt: skip
from .weights import is_weight, selects

__all__ = [
    "GRAD", "INDICES", "LEAVES", "OPS", "SCORE", "SIZES", "Capture", "Node", "Program", "apply", "const", "index", "load",
    "param", "parse", "postorder", "rebuild", "size",
]  # fmt: skip


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
    weight: a float expression of the probability, for which its leaf ``score`` stands, of positions and captures (`weights`);
        None: the probabilities meet the values as they are. With ``inf_rows`` it is one that lets every NaN through.

    Raises:
        ValueError: the sink reads the score or k; the weight is not linear, or stops NaNs of some keys of a row alone.
    """

    root: Node
    captures: tuple[Capture, ...] = ()
    params: int = 0
    zero_rows: bool = False
    sink: Node | None = None
    inf_rows: bool = False
    weight: Node | None = None

    def __post_init__(self) -> None:
        if self.sink is not None and (self.sink.kind != "float" or self.sink.depends_on("score", "grad", "k")):
            raise ValueError(
                f"fusion_kernels: the sink of a score program is {self.sink}; needed: a float of b, h, q and captures"
            )
        if self.weight is not None and not (is_weight(self.weight) and self.weight.kind == "float"):
            raise ValueError(
                f"fusion_kernels: the weight of a score program is {self.weight}; needed: products and choices that are "
                "linear in the probability, for which its leaf 'score' stands"
            )
        if self.inf_rows and self.selects:
            raise ValueError(
                f"fusion_kernels: the weight of a score program with inf_rows is {self.weight}; needed: one without a choice"
            )

    @cached_property
    def text(self) -> str:
        """The canonical text: two programs that compute the same expression from the same captures have the same text."""
        lines = ["captures " + " ".join(f"{c.kind}[{c.rank}]" for c in self.captures) if self.captures else "captures"]
        lines.append(" ".join([f"params {self.params}", *(name for name in _OF_ROWS if getattr(self, name))]))
        names: dict[Node, str] = {}
        for node in postorder(self.root, *self._others):
            parts = [node.op]
            if node.attr is not None:
                parts.append(str(node.attr) if node.op in ("index", "size") else repr(node.attr))
            parts += [names[a] for a in node.args]
            names[node] = f"%{len(names)}"
            lines.append(f"{names[node]} = {' '.join(parts)}")
        if self.sink is not None:
            lines.append(f"sink {names[self.root]} {names[self.sink]}")
        if self.weight is not None:
            lines.append(f"weight {names[self.root]} {names[self.weight]}")
        return "; ".join(lines)  # one line: compilers put constant arguments into comments of the code that they write

    @cached_property
    def loads(self) -> tuple[Node, ...]:
        """Every load of a tile of scores, or of their weights, in the order of the text."""
        roots = (self.root,) if self.weight is None else (self.root, self.weight)
        return tuple(n for n in postorder(*roots) if n.op == "load")

    @property
    def _others(self) -> tuple[Node, ...]:
        return tuple(n for n in (self.sink, self.weight) if n is not None)

    @cached_property
    def selects(self) -> bool:
        """Whether the weight makes 0 of some NaNs."""
        return self.weight is not None and selects(self.weight)

    def with_root(self, root: Node) -> Program:
        return replace(self, root=root)

    @cached_property
    def sink_program(self) -> Program | None:
        """The sink as the root of a program of its own, for its gradient."""
        return None if self.sink is None else Program(self.sink, self.captures, self.params)

    @cached_property
    def weight_program(self) -> Program | None:
        """The weight as the root of a program of its own, with the probability as its score."""
        return None if self.weight is None else Program(self.weight, self.captures, self.params)


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
    last = sink = weight = None
    _, params, *of_rows = lines[1].split()
    if not set(of_rows) <= set(_OF_ROWS):
        known = ", ".join(_OF_ROWS)
        raise ValueError(f"fusion_kernels: cannot read {lines[1]!r} of a score program: after the number come any of {known}")
    for line in lines[2:]:
        try:
            if line.startswith("sink "):
                last, sink = (nodes[word] for word in line.split()[1:])
                continue
            if line.startswith("weight "):
                last, weight = (nodes[word] for word in line.split()[1:])
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
    return Program(last, tuple(captures), int(params), "zero_rows" in of_rows, sink, "inf_rows" in of_rows, weight)
