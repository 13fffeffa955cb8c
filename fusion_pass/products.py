"""The product of queries and keys under a softmax: which products may be it, and which of several is.

Of several the op computes one and loads the others.  Any choice is right.  The one that varies over the most axes is the dearest
to store.  Of equals it is the last that was made: sites that add the same products in other orders choose alike, and what many
layers add to a product of their own was made before it, and is stored once.  A product that another site computes, because it has
no other, is to be preferred to all: were it loaded, it would have to be stored, and that site be left alone (see `together`).
"""

# sympy is not typed
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalSubscript=false
from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import sympy
from fusion_kernels.checking import MAX_HEAD_DIM
from fusion_kernels.program import Node, postorder

from .describe import Describer
from .factors import Chain, chain_of
from .probabilities import written
from .site import Reason, Refused

__all__ = ["Product", "products_under"]


@dataclass(frozen=True)
class Product:
    """A ``dot`` of the score, one factor of which varies over the queries and the other over the keys."""

    dot: Node
    q_chain: Chain
    k_chain: Chain

    @property
    def seq(self) -> int:
        """The number of the call that makes it."""
        return self.dot.attr[0]


def products_under(
    d: Describer, body: Node, query: sympy.Symbol, key: sympy.Symbol, prefer: Collection[int] = ()
) -> list[Product]:
    """The products of queries and keys in the score `body`, the one to compute first.

    Args:
        prefer: numbers of calls that make products which are better computed than loaded.

    Raises:
        Refused: (NO_SCORES, MUTATION) there is none.
    """
    dots = (node for node in postorder(body) if node.op == "dot")
    found = [p for p in (_product(d, node, query, key) for node in dots) if p is not None]
    if found:
        return sorted(found, key=lambda p: _rank(d, p, prefer), reverse=True)
    if written(d, body):
        seen = "the scores are written through a view of them"
        raise Refused(Reason.MUTATION, seen, "in-place operations on the whole tensor")
    raise Refused(Reason.NO_SCORES, "the softmax is not over a product of two tensors", "q @ k^T under the softmax")


def _product(d: Describer, dot: Node, query: sympy.Symbol, key: sympy.Symbol) -> Product | None:
    """`dot` as a product, if one factor reads the keys' axis and the other the queries'."""
    _, a, a_index, b, b_index, _ = dot.attr
    chains = chain_of(d, d.shadow.values[a], a_index), chain_of(d, d.shadow.values[b], b_index)
    # what a factor really reads is at the end of its chain: a product reads copies expanded over other axes
    first, second = ({axis for e in chain[-1][1] for axis in d.axes.of(e)} for chain in chains)
    if any(axis in first and axis in second for axis in (key, query)):
        return None
    if any(d.axes.sizes[axis] != 1 and axis not in first | second for axis in (key, query)):
        return None
    if {key, query} <= first or {key, query} <= second:
        return None
    q_chain, k_chain = chains[::-1] if key in first or query in second else chains
    return Product(dot, q_chain, k_chain)


def _rank(d: Describer, product: Product, prefer: Collection[int]) -> tuple[bool, bool, int, int]:
    """Whether the op takes a product of this head dim; is it preferred; the axes that it varies over; when it was made."""
    ends = (product.q_chain[-1][1], product.k_chain[-1][1])
    read = {axis for index in ends for e in index for axis in d.axes.of(e) if d.axes.sizes[axis] != 1}
    size = d.axes.sizes[product.dot.attr[5]]
    return not size.is_Integer or int(size) <= MAX_HEAD_DIM, product.seq in prefer, len(read), product.seq
