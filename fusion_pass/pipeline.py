"""The pass itself: trace, match, describe, decide, rewrite; one `Site` for every softmax that was looked at.

Nothing that goes wrong here reaches the user's compile: a refusal or an exception leaves the site, or the whole graph, as it
was and says so in the report (strict mode raises; `entry` sees to what fails outside the graphs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
import torch.fx
from fusion_kernels.choice import kernel_for

from . import config, legality
from .anchors import Anchor, find_anchors
from .factors import Factor
from .formula import formula, mask_facts
from .indexing import same
from .inline import OPENED, copy_graph, inline
from .library import why_left
from .match import Match, match
from .plain import plain
from .rewrite import Splice, Splicer
from .scores import Number, Scores, scores
from .shadow import trace
from .site import AttentionSite, Operand, Reason, Refused, Site, Verdict, failed
from .tape import Value, meta_value
from .together import settle

__all__ = ["run_pass"]

# Calls that may be, or hide, a softmax. A graph without any is not traced: it costs nothing.
_SOFTMAX = re.compile(r"[Ss]oftmax|\bexp2?_?\b|logsumexp|multi_head_attention|scaled_dot_product_attention|einsum")
_OPAQUE_BODIES = ("autograd_function_apply", "custom_function_call")


def run_pass(gm: torch.fx.GraphModule, *, when: str, graph: int = 0) -> tuple[Site, ...]:
    """Fuse the attention of one Dynamo graph in place.

    Args:
        gm: the graph, with fake values in ``node.meta["example_value"]``.
        when: "profitable", or "always" for every site that can be expressed.
        graph: the number of the graph in the report.

    Returns:
        every site with its verdict, those in bodies of higher-order ops first.
    """
    sites: list[Site] = []
    for body in (*_bodies(gm), gm):
        sites += _run_graph(body, when, graph, len(sites), body is not gm)
    return tuple(sites)


def _bodies(gm: torch.fx.GraphModule) -> Iterator[torch.fx.GraphModule]:
    """Bodies of higher-order ops (checkpointed regions and their like), innermost first."""
    seen: set[str] = set()
    for node in gm.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator) or any(o in str(node.target) for o in _OPAQUE_BODIES):
            continue
        for argument in node.all_input_nodes:
            body = getattr(gm, str(argument.target), None) if argument.op == "get_attr" else None
            if isinstance(body, torch.fx.GraphModule) and argument.target not in seen:
                seen.add(str(argument.target))
                yield from _bodies(body)
                yield body


def _run_graph(gm: torch.fx.GraphModule, when: str, graph: int, first: int, body: bool) -> list[Site]:
    if not any(_SOFTMAX.search(str(n.target)) for n in gm.graph.nodes if n.op.startswith("call")):
        return []
    given = copy_graph(gm.graph)
    try:
        return _fuse(gm, when, graph, first, body)
    except Refused as refusal:  # the graph cannot be traced
        verdict = Verdict(False, reason=refusal.reason, seen=refusal.seen, needed=refusal.needed)
    except Exception as error:
        if config.strict():
            raise
        verdict = failed(error)
    if [n.name for n in gm.graph.nodes] != [n.name for n in given.nodes]:  # it goes on as it came
        gm.graph = given
        gm.recompile()
    return [Site(first, graph, "", "", "", verdict)]


def _fuse(gm: torch.fx.GraphModule, when: str, graph: int, first: int, body: bool) -> list[Site]:
    """The sites of one graph, fused where they may be.

    Raises:
        Refused: (CAPTURE) the graph cannot be traced.
    """
    backup: torch.fx.Graph | None = None
    closed: dict[str, Verdict] = {}  # composite calls that hold no fusable site, with the verdict
    while True:
        sites, opened, refused = _Run(gm, when, graph, first, body, closed).run(may_open=backup is None)
        if opened is not None:  # composite calls were opened: once more, on the graph as it is now
            backup = opened
            continue
        if backup is not None and refused:  # what was opened for nothing is closed again
            gm.graph = backup
            gm.recompile()
            backup, closed = None, {**closed, **refused}
            continue
        return sites


class _Run:
    """One pass over one graph."""

    def __init__(
        self, gm: torch.fx.GraphModule, when: str, graph: int, first: int, body: bool, closed: dict[str, Verdict]
    ) -> None:
        self.gm, self.when, self.graph, self.first, self.closed = gm, when, graph, first, closed
        self.shadow = trace(gm, body)
        self.splicer = Splicer(gm, self.shadow)
        self.matches: dict[Anchor, Match | Refused] = {}
        self.counted: set[Value] = set()  # tensors that some site no longer stores

    def run(self, may_open: bool) -> tuple[list[Site], torch.fx.Graph | None, dict[str, Verdict]]:
        """The sites; or a copy of the graph from before composite calls were opened; and the calls that were refused."""
        anchors = self._needed(find_anchors(self.shadow))
        anchors = [a for a in anchors if a.first is None or self._is_another(a)]
        self._agree(anchors)
        if may_open:
            composite = self._composites(anchors)
            if composite:
                backup = copy_graph(self.gm.graph)
                for node in composite:
                    inline(self.gm, self.shadow, node)
                self.gm.recompile()
                return [], backup, {}
        groups = self._together([self._prepared(anchor) for anchor in anchors])
        self.splicer.finish()
        opened = [(a.record.node.meta.get(OPENED), sites[0].verdict) for a, sites in zip(anchors, groups, strict=True)]
        sites = [replace(site, index=self.first + i) for i, site in enumerate(site for sites in groups for site in sites)]
        return sites, None, {name: verdict for name, verdict in opened if name is not None and not verdict.fused}

    def _composites(self, anchors: list[Anchor]) -> list[torch.fx.Node]:
        """Calls that hold a whole site which would be fused."""
        found: dict[torch.fx.Node, None] = {}
        for anchor in anchors:
            node = anchor.product.node
            if node.name in self.closed or len(self.shadow.by_node[node]) < 2:
                continue
            try:
                if self._match(anchor).output.node is None and not self._left(anchor):
                    found[node] = None
            except Refused:
                continue
        return list(found)

    def _left(self, anchor: Anchor) -> str | None:
        """Why a call of the library's attention is not replaced, or None where it is, or where it is no such call."""
        found = self._match(anchor)
        given = anchor.record.library, legality.site_device(found), found.k.shape[2]
        return why_left(*given) if self.when == "profitable" else None

    def _match(self, anchor: Anchor) -> Match:
        """The match of an anchor, made once."""
        if anchor not in self.matches:
            try:
                self.matches[anchor] = match(self.shadow, anchor)
            except Refused as refusal:
                self.matches[anchor] = refusal
        found = self.matches[anchor]
        if isinstance(found, Refused):
            raise found
        return found

    def _needed(self, anchors: list[Anchor]) -> list[Anchor]:
        """Without products that nothing needs, of a softmax that has one that something does."""
        live = {a for a in anchors if a.product.node in self.splicer.live}
        softmaxes = {a.record for a in live}
        return [a for a in anchors if a in live or a.record not in softmaxes]

    def _is_another(self, anchor: Anchor) -> bool:
        """Whether a softmax that is attention is so with this product as well; else it is its reader, like any other."""
        try:
            self._match(anchor.first or anchor)
            self._match(anchor)
        except Refused:
            return False
        return True

    def _agree(self, anchors: list[Anchor]) -> None:
        """Let sites with several products compute those that others compute: who has no choice goes first.

        Not where its own product is made from such a one, as in a layer that adds the scores of the layer before: then that
        one has to be loaded, for the other cannot be.
        """
        found: list[tuple[Anchor, Match]] = []
        for anchor in anchors:
            if anchor.product.node.name not in self.closed:
                with suppress(Exception):  # `_prepared` says what is wrong
                    found.append((anchor, self._match(anchor)))
        computed: set[int] = set()
        for anchor, chosen in sorted(found, key=lambda f: len(f[1].products)):
            if chosen.others:
                computed.update(m.product for m in (chosen, *chosen.others))
                continue
            before = {p for p in chosen.products & computed if not self._is_made_from(chosen.product, p)}
            if chosen.product not in computed and before:
                self.matches[anchor] = chosen = match(self.shadow, anchor, before)
            computed.add(chosen.product)

    def _is_made_from(self, product: int, other: int) -> bool:
        """Whether the result of call number `other` is read, at whatever distance, by call number `product`."""
        (record,) = self.shadow.between(product, product)
        return record.outputs[0] in self.shadow.made_from(other, product)

    def _together(self, prepared: list[tuple[list[Site], Splice | None]]) -> list[list[Site]]:
        """The sites with the last word on them: those stay that share what they make with each other alone."""
        splices = [splice for _, splice in prepared if splice is not None]
        try:
            refused = settle(self.shadow, self.splicer.liveness, splices)
        except Exception:
            for splice in splices:
                self.splicer.withdraw(splice)
            self.splicer.finish()
            raise
        groups: list[list[Site]] = []
        for sites, splice in prepared:
            if splice in refused:
                self.splicer.withdraw(splice)
                sites = [replace(site, verdict=_refused(refused[splice])) for site in sites]
            elif splice is not None:
                self.splicer.commit(splice)
            groups.append(sites)
        return groups

    def _prepared(self, anchor: Anchor) -> tuple[list[Site], Splice | None]:
        """A site by itself, or those of the terms of one sum, and what takes their place where they may be fused."""
        source, code = _source(anchor.record.node)
        site = Site(self.first, self.graph, source, code, anchor.record.node.name, Verdict(False))
        terms: list[AttentionSite] = []
        if anchor.product.node.name in self.closed:
            return [replace(site, verdict=self.closed[anchor.product.node.name])], None
        try:
            first = self._match(anchor)
            verdicts, ready = [], []
            for found in (first, *first.others):
                score = scores(found)
                terms.append(self._describe(found, score))
                verdict = self._decide(found, score, terms[-1])
                sdpa = plain(found, score.program) if verdict.kernel == "cudnn" else None
                if verdict.kernel == "cudnn" and sdpa is None:  # the op decides, call by call, with the sizes before it
                    verdict = replace(verdict, kernel=_undecided(found), backward=verdict.backward and _undecided(found))
                verdicts.append(verdict)
                ready.append((found, score, sdpa))
            splice = self.splicer.prepare(ready)
            return [replace(site, verdict=v, attention=a) for v, a in zip(verdicts, terms, strict=True)], splice
        except Refused as refusal:
            verdict = _refused(refusal)
        except Exception as error:
            if config.strict():
                raise
            verdict = failed(error)
        return [replace(site, verdict=verdict, attention=a) for a in terms or [None]], None

    def _decide(self, found: Match, score: Scores, attention: AttentionSite) -> Verdict:
        """The verdict on a site that may be fused.

        Raises:
            Refused: it may not be, or would not pay.
        """
        legality.check(self.shadow, found, score, device=attention.device)
        needing = [o.requires_grad for o in (attention.q, attention.k, attention.v)]
        captured = any(c.requires_grad for c in attention.captures)
        named = partial(
            kernel_for, attention.device, attention.q.dtype, attention.v.dtype, score.program, attention.dropout_p,
            same_head_dim=same(found.q.shape[3], found.v.shape[3]),
        )  # fmt: skip
        kernel = named()
        trained = found.anchor.product.grad and (captured or any(needing))
        if self.when == "profitable":
            reason = self._left(found.anchor) or legality.profitable(found, kernel, attention.device, trained, captured)
            if reason is not None:
                raise Refused(Reason.NOT_PROFITABLE, reason, 'when="always" fuses it all the same')
        return Verdict(True, kernel, named(backward=True, capture_grads=captured) if trained else "")

    def _describe(self, found: Match, score: Scores) -> AttentionSite:
        names = [_name(c) if isinstance(c, Value) else str(c.expr) for c in score.captures]
        captures = tuple(_captured(c, n) for c, n in zip(score.captures, names, strict=True))
        learned = tuple(i for i, c in enumerate(captures) if c.requires_grad)
        params = [str(e) for e in score.params]
        return AttentionSite(
            q=self._operand(found.q),
            k=self._operand(found.k),
            v=self._operand(found.v),
            program=score.program,
            captures=captures,
            dropout_p=found.dropout_p,
            formula=formula(score.program, names, params),
            mask=mask_facts(score.program, names, params, learned),
            device=legality.site_device(found),
            bytes_saved=legality.bytes_saved(found, score, self.counted),
        )

    def _operand(self, factor: Factor) -> Operand:
        shape = tuple(int(s) if s.is_Integer else str(self.shadow.plain(s)) for s in factor.shape)
        return Operand(shape, factor.dtype, _requires_grad(factor.value), _name(factor.value))


def _refused(refusal: Refused) -> Verdict:
    return Verdict(False, reason=refusal.reason, seen=refusal.seen, needed=refusal.needed)


def _captured(what: Value | Number, name: str) -> Operand:
    if isinstance(what, Number):
        return Operand((), torch.float32, False, name)
    return Operand(tuple(what.shape), what.dtype, _requires_grad(what), name)


def _undecided(found: Match) -> str:
    """What runs a site that cuDNN could take, were it not for sizes that do not suit it or are not known."""
    sizes = (*found.q.shape, *found.k.shape, *found.v.shape)
    return "triton" if all(size.is_Integer for size in sizes) else "cudnn or triton"


def _requires_grad(value: Value) -> bool:
    if value.node is None:  # inside a composite call: Dynamo says nothing of it
        return value.differentiable
    given = meta_value(value.node)
    return isinstance(given, torch.Tensor) and given.requires_grad


def _name(value: Value) -> str:
    """The user's name of a value: Dynamo calls an input ``l_self_mask_`` and a variable by its name."""
    name = value.node.name if value.node is not None else "tensor"
    return re.sub(r"^l_(self_|s_)?(modules_|buffers_|parameters_)?|_$", "", name) or name


def _source(node: torch.fx.Node) -> tuple[str, str]:
    """The innermost line of the user's own stack: "file.py:12 in forward", and the code there."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    frames = [(lines[i], lines[i + 1] if i + 1 < len(lines) else "") for i, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return "", ""
    where, code = frames[-1]
    found = re.match(r'File "(.*)", line (\d+), in (.*)', where)
    return (f"{found[1]}:{found[2]} in {found[3]}", code) if found else (where, code)
