"""The op's result lies in the queries' memory order; whoever would notice gets eager's, and nobody else pays for a copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusion_pass


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (b, n, h, d) tensors: the queries lie in memory otherwise than eager's product."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT * 0.25).softmax(-1) @ v


def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads merged into the batch without a copy, as eager's product allows."""
    out = heads(q, k, v)
    return out.view(-1, *out.shape[2:])


def viewed_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The strides go on through what is pointwise."""
    out = nn.functional.hardswish(heads(q, k, v)) + 1.0
    return out.view(out.shape[0] * out.shape[1], -1)


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LeViT's convolutions: v p^T, channels before positions, heads and head dims merged by a view."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = v.mT.contiguous() @ (q @ k.mT * 0.25).softmax(-1).mT
    return out.view(out.shape[0], -1, out.shape[3])


def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return heads(q, k, v)


def returned_transposed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = heads(q, k, v).transpose(1, 2)
    return out, out.flatten(2)


def written_through_a_reshape(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reshape is a view in eager: what is written to it is in `out`."""
    out = heads(q, k, v)
    out.reshape(-1, *out.shape[2:]).mul_(2.0)
    return out * 1.5


def written_to_a_copy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reshape is a copy in eager: what is written to it is not in `out`."""
    out = heads(q, k, v)
    merged = out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
    merged.mul_(2.0)
    return merged.sum(-1) + out.sum((1, 3))


def in_a_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What leaves the region is viewed outside."""
    out = checkpoint(heads, q, k, v, use_reentrant=False)
    assert isinstance(out, Tensor)
    return out.view(-1, *out.shape[2:])


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The second op's queries lie as the first one's result does."""
    out = heads(q, k, v)
    out = (out @ out.mT * 0.25).softmax(-1) @ out
    return out.view(-1, *out.shape[2:])


NOTICED = [
    viewed, viewed_later, values_first, returned, returned_transposed, written_through_a_reshape, written_to_a_copy,
    in_a_checkpoint, twice,
]  # fmt: skip


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What most models do: the strides are eager's again after two calls."""
    out = heads(q, k, v).transpose(1, 2)
    return out.reshape(*out.shape[:2], -1)


def merged_contiguous(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = heads(q, k, v).permute(0, 2, 1, 3).contiguous()
    return out.view(*out.shape[:2], -1) * 2.0


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 9, 3, 8, requires_grad=True) for _ in range(3)]


def _compiled(fn: Callable, dynamic: bool, sites: int = 1) -> tuple[Callable, Recorder]:
    recorder = Recorder("eager")
    compiled = compile_always(fn, recorder, dynamic=dynamic)
    fused = run(compiled, inputs())
    assert_fused(fusion_pass.last_report(), recorder, sites)
    assert_rule(fused, run(fn, inputs()), exactly(fn, inputs()), fn.__name__)
    return compiled, recorder


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", NOTICED)
def test_strides_are_those_of_eager(fn: Callable, dynamic: bool) -> None:
    compiled, _ = _compiled(fn, dynamic, sites=2 if fn is twice else 1)
    got, wanted = compiled(*inputs()), fn(*inputs())
    for x, y in zip(*((o if isinstance(o, tuple) else (o,)) for o in (got, wanted)), strict=True):
        assert x.stride() == y.stride()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", [merged, merged_contiguous])
def test_no_copy_where_nobody_notices(fn: Callable, dynamic: bool) -> None:
    _, recorder = _compiled(fn, dynamic)
    copies = [n for gm in recorder.graphs for n in gm.graph.nodes if n.target in ("contiguous", "clone")]
    assert len(copies) == (fn is merged_contiguous)


def test_inductor_takes_the_view() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(viewed, backend=fusion_pass.make_backend(when="always"))
    torch.testing.assert_close(compiled(*inputs()), viewed(*inputs()))
    assert len(fusion_pass.last_report().fused) == 1
