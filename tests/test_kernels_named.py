"""The kernels that the report names are those that run, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import Recorder, compile_always
from fusion_kernels import calls, choice
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusion_pass

SCORES = (2, 3, 9, 7)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(q @ k.mT).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def detached(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return biased(q, k, v, bias.exp().detach())


def without_grad(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        return biased(q, k, v, bias)


def of_a_table(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    near = (torch.arange(9)[:, None] // 3 - torch.arange(7) // 2 + 3) % 4
    return biased(q, k, v, table[near].permute(2, 0, 1))


def checkpointed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
    return checkpoint(biased, q, k, v, bias, use_reentrant=False)


def tensors(*more: tuple[int, ...], dv: int = 8, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, dv), *more]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
    "plain": (plain, tensors(), "aten-cpu, backward tiled"),
    "no gradients": (plain, tensors(grad=False), "aten-cpu"),
    "no grad mode": (without_grad, tensors(SCORES), "aten-cpu"),
    "16 bits": (plain, tensors(dtype=torch.bfloat16), "aten-cpu, backward tiled"),
    "a function of the score": (softcap, tensors(), "tiled"),
    "other head dim of the values": (plain, tensors(dv=5), "tiled"),
    "a learned bias": (biased, tensors(SCORES), "aten-cpu, backward tiled"),
    "a bias of the keys": (biased, tensors((2, 1, 1, 7)), "aten-cpu, backward tiled"),
    "a bias that is given": (biased, [*tensors(), tensors(SCORES, grad=False)[-1]], "aten-cpu, backward tiled"),
    "a bias that is detached": (detached, tensors(SCORES), "aten-cpu, backward tiled"),
    "a bias alone learns": (biased, [*tensors(grad=False), tensors(SCORES)[-1]], "aten-cpu, backward tiled"),
    "a bias of a learned table": (of_a_table, tensors((4, 3)), "aten-cpu, backward tiled"),
    "a learned bias, checkpointed": (checkpointed, tensors(SCORES), "aten-cpu, backward tiled"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_named_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, inputs, kernels = CASES[name]
    ran: dict[str, str] = {}
    choose = choice.choose

    def spy(*args: Any) -> str:
        way = choose(*args)
        ran["forward" if args[-1] is None else "backward"] = {"aten": "aten-cpu"}.get(way, way)
        return way

    monkeypatch.setattr(choice, "choose", spy)
    for plans in ("_forwards", "_backwards"):  # what was chosen for earlier calls of this kind
        monkeypatch.setattr(calls, plans, {})
    out = compile_always(fn, Recorder())(*inputs)
    if out.requires_grad:
        out.sum().backward()
    report = fusion_pass.last_report()
    (verdict,) = (site.verdict for site in report.fused)
    assert (verdict.kernel, verdict.backward) == (ran["forward"], ran.get("backward", ""))
    assert f"  kernel   {kernels}\n" in f"{report}\n"
