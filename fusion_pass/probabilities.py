"""From the factor of the values up to the softmax, and from the softmax to its product of queries and keys."""

# sympy is not typed
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalSubscript=false
from __future__ import annotations

import sympy
from fusion_kernels.program import Node, postorder

from .anchors import Anchor, reaches_product
from .describe import Describer, has_score, unrounded
from .dropout import Draw, as_dropout
from .normal import as_softmax
from .site import Reason, Refused

__all__ = ["find_softmax", "written"]


def find_softmax(d: Describer, anchor: Anchor, node: Node, key: sympy.Symbol) -> tuple[Node, Draw | None]:
    """The softmax over `key` that `node`, a probability, comes from through casts and one dropout.

    Raises:
        Refused: PROBABILITIES_EDITED, SOFTMAX_DIM or MUTATION.
    """
    operand, draw = anchor.product.args[anchor.side], None
    if operand.before is not None:
        raise _rewritten()
    if not has_score(node):  # there is nothing to fuse: the reason is the same whether what is there was rounded or not
        node = unrounded(node)
    while True:
        if node.op == "narrowed" and node.attr == operand.dtype:
            node = node.args[0]
            continue
        found = as_dropout(d, node) if draw is None else None
        if found is not None:
            draw, node = found
            continue
        softmax = as_softmax(d, node, key)
        if softmax is None:
            raise _edited(d, node)
        position = softmax.attr[1]
        if position == key or (position == 0 and d.axes.sizes[key] == 1):
            return softmax, draw
        if reaches_product(d.shadow.readers, anchor.product.outputs[0]) is not None:
            raise Refused(Reason.PROBABILITIES_EDITED, "a product mixes them over another dim first", "softmax, then the values")
        needed = "softmax over the dim that is summed with the values"
        raise Refused(Reason.SOFTMAX_DIM, f"softmax over the dim at {position}", needed)


def _edited(d: Describer, node: Node) -> Refused:
    if written(d, node):
        return _rewritten()
    if any(n.op in ("softmax", "sum", "log_softmax") for n in postorder(node)):
        needed = "at most casts and one dropout between softmax and values"
        return Refused(Reason.PROBABILITIES_EDITED, f"{node.op} after the softmax", needed)
    seen = "the factor of the values is not a softmax of anything that can be read back"
    return Refused(Reason.PROBABILITIES_EDITED, seen, "casts, views and dropout only, between softmax and values")


def _rewritten() -> Refused:
    return Refused(Reason.MUTATION, "the probabilities are written through a view of them", "out-of-place operations")


def written(d: Describer, node: Node) -> bool:
    """Whether something below was left by a write that no rule describes (through a view, or by index)."""
    values = [d.shadow.values[n.attr[0]] for n in postorder(node) if n.op == "value"]
    return any(v.before is not None or (v.record is not None and v.record.mutates) for v in values)
