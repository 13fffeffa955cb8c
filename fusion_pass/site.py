"""What the stages hand to each other: a site as described, the verdict on it, and the reasons for a refusal."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fusion_kernels.program import Program

__all__ = ["AttentionSite", "MaskFacts", "Operand", "Reason", "Refused", "Site", "Verdict", "overwritten"]


class Reason(enum.Enum):
    """Why a site was left alone. The value is the headline that a user reads; each use adds what was seen and needed."""

    PROBABILITIES_USED = "the attention probabilities are used elsewhere"
    PROBABILITIES_EDITED = "the attention probabilities are edited after the softmax"
    SCORES_USED = "the scores are used elsewhere"
    DROPOUT = "the bits of the dropout mask are not for one probability of one attention each"
    NO_SCORES = "no product of queries and keys under the softmax"
    NO_VALUES = "the softmax does not end in a product with values"
    SOFTMAX_DIM = "the softmax runs over another dim than the keys"
    NOT_EXPRESSIBLE = "the score is not a pointwise function of q.k"
    LAYOUT = "queries, keys or values cannot be viewed as (batch, heads, length, head dim)"
    MUTATION = "a tensor of the site is changed in place through a view"
    HEAD_DIM = "the head dim is not supported"
    DTYPE = "the dtype is not supported"
    DEVICE = "the device is not supported"
    NOT_PROFITABLE = "fusing would not pay"
    TOO_LARGE = "the expression is too large to describe"
    INTERNAL = "the pass failed on this site"
    CAPTURE = "the graph could not be traced"


class Refused(Exception):
    """Raised anywhere between matching and rewriting; caught once, where the verdict is made.

    Args:
        reason: the kind of refusal.
        seen: what was found, in the user's words (ops, shapes, dtypes).
        needed: what would have been fusable.
    """

    def __init__(self, reason: Reason, seen: str, needed: str = "") -> None:
        super().__init__(f"{reason.value}: {seen}" + (f"; needed: {needed}" if needed else ""))
        self.reason, self.seen, self.needed = reason, seen, needed


def overwritten(shape: Sequence[Any]) -> Refused:
    """Of a tensor that the op would read where it no longer holds what the attention read."""
    return Refused(
        Reason.MUTATION,
        f"a {tuple(shape)} tensor is written in place before the attention is done with it",
        "inputs of the attention that nothing writes before its end",
    )


@dataclass(frozen=True)
class Operand:
    """q, k or v as the op will read it: (B, heads, length, head dim), strided. Shapes may hold SymInts."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    requires_grad: bool
    name: str  # the user-visible name of the Dynamo value that it is a view of


@dataclass(frozen=True)
class MaskFacts:
    """What is proved about the mask from the program alone (no tensor values)."""

    text: str  # e.g. "causal: k <= q", "full" when nothing can be skipped
    skips: bool  # whether whole tiles are skipped


@dataclass(frozen=True)
class AttentionSite:
    """One attention, described: everything that the verdict, the rewrite and the report need."""

    q: Operand  # (B, H, N, D)
    k: Operand  # (B, kv heads, M, D)
    v: Operand  # (B, kv heads, M, Dv)
    program: Program
    captures: tuple[Operand, ...]  # in the order of program.captures; shapes as loaded
    dropout_p: float
    formula: str  # softmax(q k^T / 8 + mask[b, k])
    mask: MaskFacts
    device: torch.device
    bytes_saved: int | None  # N x N bytes that a forward no longer stores, each at one site; None when sizes are symbolic
    plan: Any = field(default=None, repr=False, compare=False)  # what rewrite.py needs to splice (values, views)


@dataclass(frozen=True)
class Verdict:
    """What was decided, and why.

    fused: whether the op was spliced in.
    kernel: which implementation runs its forward ("triton", "cudnn", "aten-cpu", "tiled").
    backward: which runs its backward; empty where nothing needs a gradient.
    """

    fused: bool
    kernel: str = ""
    backward: str = ""
    reason: Reason | None = None
    seen: str = ""
    needed: str = ""


def failed(error: Exception) -> Verdict:
    """Of what the pass could not handle: an error of ours, which is no reason to stop the user's compile."""
    seen = f"{type(error).__name__}: {error}"
    return Verdict(
        False, reason=Reason.INTERNAL, seen=seen, needed="a report of this error; FUSION_PASS_STRICT=1 shows where it is"
    )


@dataclass(frozen=True)
class Site:
    """One softmax of the user's graph with a product of its probabilities and values, and the verdict: a line of the report."""

    index: int
    graph: int  # which compiled graph of the report
    source: str  # "model.py:123 in forward" of the softmax, from the user's stack
    code: str  # the user's source line
    softmax: str  # the Dynamo node's name
    verdict: Verdict
    attention: AttentionSite | None = None  # None where it could not be described
