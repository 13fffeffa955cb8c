"""Which of the prepared sites stay: those of which nothing that is left in the graph reads a tensor.

A site may share its scores, its probabilities or its dropout mask, but only with sites that are fused as well.  Each op then
makes them again from the same queries and keys, and from the same bits: what it computes, and the gradients that it adds to
what they share, are those of a graph in which every site had a copy of its own.  Were one site left as it is, the others would
only add work to a graph that stores their tensors all the same; and beside a mask that is still drawn, theirs would be another.

So a site stays if no live node holds a tensor of it, in the graph where each site that stays is replaced.  A site that goes
makes more nodes live, never fewer, for an op reads nothing that the calls in its place did not read: so the largest such set
is found by starting with all of them and taking out what does not stay, until all do, in whatever order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch.fx import Node

from .dropout import Bits
from .liveness import Liveness
from .rewrite import Splice
from .site import Reason, Refused
from .tape import Shadow, Value

__all__ = ["settle"]

_USED = {
    Reason.DROPOUT: "a mask that only attentions read, all of them fused, each bit at one place",
    Reason.PROBABILITIES_USED: "probabilities that only the product with the values reads",
    Reason.SCORES_USED: "scores that only the softmax reads",
}


def settle(shadow: Shadow, liveness: Liveness, splices: Sequence[Splice]) -> dict[Splice, Refused]:
    """Those that do not stay, each with its refusal (PROBABILITIES_USED, SCORES_USED or DROPOUT). Nothing is changed."""
    refused = {**_of_one_target(splices), **_of_one_mask(splices)}
    made = {s: _made(shadow, s) for s in splices}
    while True:
        staying = {s.target: s for s in splices if s not in refused}
        live = liveness.live({target: [s.out] for target, s in staying.items()})
        needed = {s: found for s in staying.values() if (found := _needed(shadow, s, made[s], staying, live)) is not None}
        if not needed:
            return refused
        refused |= needed


def _of_one_target(splices: Sequence[Splice]) -> dict[Splice, Refused]:
    """All but the first of those that would stand in for one node: a product of one softmax with another."""
    first: dict[Node, Splice] = {}
    others = [s for s in splices if first.setdefault(s.target, s) is not s]
    seen = "they are the values of another softmax"
    return {s: Refused(Reason.PROBABILITIES_USED, f"{seen} in {s.target.name}", _USED[Reason.PROBABILITIES_USED]) for s in others}


def _of_one_mask(splices: Sequence[Splice]) -> dict[Splice, Refused]:
    """Those that drop by one mask, and not all by the same bit at the same place."""
    by_mask: dict[int, list[tuple[Bits, Splice]]] = {}
    for s in splices:
        for match in s.matches:
            if match.bits is not None:
                by_mask.setdefault(match.bits.record.seq, []).append((match.bits, s))
    seen = "attentions read one mask at different places"
    return {
        s: Refused(Reason.DROPOUT, seen, _USED[Reason.DROPOUT])
        for sharing in by_mask.values()
        if len({bits for bits, _ in sharing}) > 1
        for _, s in sharing
    }


def _scored(shadow: Shadow, splice: Splice) -> set[Value]:
    """What is made of the scores."""
    return set[Value]().union(*(shadow.made_from(m.product, m.end) for m in splice.matches))


def _made(shadow: Shadow, splice: Splice) -> list[tuple[Value, Reason]]:
    """What the site makes and does not store once it is fused, the last first."""
    reason = {True: Reason.PROBABILITIES_USED, False: Reason.SCORES_USED}
    found: dict[Value, Reason] = {}
    for match in splice.matches:
        scored = match.walked & shadow.made_from(match.product, match.end)
        made = {v: v.record.seq for v in scored if v.record is not None and v.record.seq < match.end}
        found |= {v: reason[seq >= match.anchor.record.seq] for v, seq in made.items()}
    return sorted(found.items(), key=lambda f: -f[0].record.seq)  # pyright: ignore[reportOptionalMemberAccess]


def _masks(shadow: Shadow, splice: Splice, staying: Collection[Node]) -> Iterator[tuple[Value, Reason]]:
    """What is made of the dropout mask and not of the scores, by no attention that stays."""
    scored = _scored(shadow, splice)
    for match in splice.matches:
        if match.bits is not None:
            drawn = shadow.made_from(match.bits.record.seq, match.end, staying)
            yield from ((v, Reason.DROPOUT) for v in sorted(drawn - scored, key=lambda v: -v.seq))


def _needed(
    shadow: Shadow, splice: Splice, made: list[tuple[Value, Reason]], staying: dict[Node, Splice], live: set[Node]
) -> Refused | None:
    """The refusal of a site of which the graph needs a tensor; None where it needs none."""
    for value, reason in (*_masks(shadow, splice, staying), *made):
        if value.node in live and value.node is not splice.target:
            return Refused(reason, _reader(value.node, live, staying), _USED[reason])
    return None


def _reader(node: Node, live: set[Node], staying: dict[Node, Splice]) -> str:
    """Who reads a node; an op that stays goes by the name of its target."""
    user = next((u for u in node.users if u in live and u not in staying), node)
    names = {n: s.target.name for s in staying.values() for n in s.added}
    return "the graph returns them" if user.op == "output" else f"{names.get(user, user.name)} reads them"
