"""How a table of (query, key) lies in memory where the kernel reads it: beside each other what a row of keys reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run
from fusion_kernels.op import ATTENTION
from torch import Tensor

import fusion_pass

H, N, M = 3, 63, 129


def inputs(*bias: int, order: tuple[int, ...] | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, H, N, 16), (2, H, M, 16), (2, H, M, 16)
    table = torch.randn(bias, generator=generator)
    if order is not None:
        table = table.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])
    return [*(torch.randn(s, generator=generator).requires_grad_() for s in shapes), table.requires_grad_()]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + bias).softmax(-1) @ v


def heads_innermost(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As a linear layer makes it of pairs, or an embedding of buckets."""
    return attend(q, k, v, bias.permute(2, 0, 1))


def copied_by_the_user(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """As Swin does, of one row for each pair: the copy is what is read."""
    return attend(q, k, v, bias.view(N, M, H).permute(2, 0, 1).contiguous())


def transposed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(q, k, v, bias.mT)


def captured(recorder: Recorder) -> Tensor:
    """What the op is given for the table."""
    (op,) = (n for gm in recorder.graphs for n in gm.graph.nodes if n.target is ATTENTION)
    (table,) = op.args[3]
    return table.meta["example_value"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("fn", "bias", "strides"),
    [
        (heads_innermost, inputs(N, M, H), (M, 1, N * M)),
        (transposed, inputs(H, M, N), (M * N, 1, M)),
        (copied_by_the_user, inputs(N * M, H), (N * M, M, 1)),
        (attend, inputs(H, N, M), (N * M, M, 1)),
    ],
)  # fmt: skip
def test_neighbouring_keys_lie_beside_each_other(
    fn: Callable[..., Tensor], bias: list[Tensor], strides: tuple[int, ...], dynamic: bool
) -> None:
    recorder = Recorder("eager")
    fused = run(compile_always(fn, recorder, dynamic=dynamic), bias)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(fn, bias), exactly(fn, bias))
    if not dynamic:
        assert captured(recorder).stride() == strides


def test_what_lies_well_is_not_copied() -> None:
    recorder = Recorder("eager")
    compile_always(attend, recorder)(*inputs(H, N, M))
    calls = [n.target for gm in recorder.graphs for n in gm.graph.nodes if n.op == "call_method"]
    assert "contiguous" not in calls


def test_what_is_expanded_is_not_copied() -> None:
    """A copy of it would be larger than the table."""
    q, k, v, bias = inputs(N, M, 1)
    expanded = bias.detach().expand(N, M, H)
    recorder = Recorder("eager")
    compile_always(heads_innermost, recorder)(q, k, v, expanded)
    assert captured(recorder).stride() == (M, 1, 0)
