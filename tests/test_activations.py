"""Activation functions of a score: value and gradient where ATen has its kinks, at infinities, and far out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run
from fusion_kernels.derivative import vjp
from fusion_kernels.evaluate import Box, Environment, evaluate
from fusion_kernels.program import SCORE, Program
from torch import Tensor

import fusion_pass
from fusion_pass.activations import ACTIVATIONS

POINTS = [-torch.inf, -1e4, -20.0, -3.0, -2.0, -1.0, -0.5, -0.0, 0.0, 0.3, 0.5, 1.0, 2.0, 3.0, 10.0, 20.0, 21.0, 1e4, torch.inf]

# name -> (function, the name and arguments of its ATen call)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, tuple[Any, ...]]] = {
    "relu": (F.relu, "relu", ()),
    "threshold": (lambda x: F.threshold(x, 0.5, -2.0), "threshold", (0.5, -2.0)),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, 3.0), "hardtanh", (-2.0, 3.0)),
    "relu6": (F.relu6, "hardtanh", (0, 6)),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid", ()),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), "leaky_relu", (0.1,)),
    "elu": (lambda x: F.elu(x, 0.7), "elu", (0.7,)),
    "selu": (F.selu, "elu", (1.6732632423543772, 1.0507009873554805)),
    "celu": (lambda x: F.celu(x, 0.7), "celu", (0.7,)),
    "logsigmoid": (F.logsigmoid, "log_sigmoid_forward", ()),
    "softplus": (F.softplus, "softplus", ()),
    "softplus_2_1": (lambda x: F.softplus(x, 2.0, 1.0), "softplus", (2.0, 1.0)),
    "silu": (F.silu, "silu", ()),
    "gelu": (F.gelu, "gelu", ()),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), "gelu", ("tanh",)),
}

SINGLE = ("hardsigmoid", "celu")  # ATen holds their 1/6 and 1/alpha in fp32, whatever the dtype


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradient(name: str) -> None:
    """In float64, point by point; NaN (as of silu at -inf) in the same places."""
    fn, op, args = FUNCTIONS[name]
    program = Program(ACTIVATIONS[op](SCORE, *args))
    x = torch.tensor(POINTS, dtype=torch.float64).requires_grad_()
    wanted = fn(x)
    (slope,) = torch.autograd.grad(wanted.sum(), x)
    m = len(POINTS)
    score = x.detach().view(1, 1, 1, m)
    box = Box((0, 1), (0, 1), (0, 1), (0, m))
    env = Environment(box, dict(zip("BHNM", (1, 1, 1, m), strict=True)), [], [], torch.float64, x.device, score)
    env.grad = torch.ones_like(score)
    value, gradient = evaluate([program.root, vjp(program).dscore], env)
    torch.testing.assert_close(value.flatten(), wanted.detach(), rtol=1e-14, atol=1e-14, equal_nan=True)
    rtol = torch.finfo(torch.float32).eps if name in SINGLE else 1e-13
    torch.testing.assert_close(gradient.flatten(), slope, rtol=rtol, atol=1e-13, equal_nan=True)


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float().requires_grad_()


@pytest.mark.parametrize("name", ["hardtanh", "relu6", "threshold", "hardsigmoid", "elu", "leaky_relu", "relu", "logsigmoid"])
def test_scores_at_the_kinks(name: str) -> None:
    """Whole numbers in q and k: scores fall on -2, 0, 3 and 6 exactly, and the gradients there are eager's."""
    fn = FUNCTIONS[name][0]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fn(q @ k.mT).softmax(-1) @ v

    inputs = [whole_numbers(2, 17, 3, seed=0), whole_numbers(2, 63, 3, seed=1), whole_numbers(2, 63, 5, seed=2)]
    recorder = Recorder("eager")
    fused = run(compile_always(attention, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(attention, inputs), exactly(attention, inputs), name)


def test_hardtanh_is_not_clamp() -> None:
    """One value, two gradients: the interval of clamp is closed, that of hardtanh is open."""

    def attention(bound: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: bound(q @ k.mT, -2.0, 3.0).softmax(-1) @ v

    inputs = [whole_numbers(2, 17, 3, seed=0), whole_numbers(2, 63, 3, seed=1), whole_numbers(2, 63, 5, seed=2)]
    results = []
    for bound in (F.hardtanh, torch.clamp):
        fn, recorder = attention(bound), Recorder("eager")
        results.append(run(compile_always(fn, recorder), inputs))
        assert_fused(fusion_pass.last_report(), recorder, 1)
        assert_rule(results[-1], run(fn, inputs), exactly(fn, inputs), bound.__name__)
    hard, clamp = results
    assert torch.equal(hard.outputs[0], clamp.outputs[0])
    assert hard.gradients[0] is not None and clamp.gradients[0] is not None
    assert float((hard.gradients[0] - clamp.gradients[0]).abs().max()) > 1e-2


def test_slope_as_a_tensor() -> None:
    """``F.prelu`` with a slope a head: the slope has a gradient."""

    def attention(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return F.prelu(q @ k.mT, slope).softmax(-1) @ v

    inputs = [whole_numbers(2, 3, 17, 5, seed=i) for i in range(3)] + [torch.tensor([0.25, -0.5, 0.0]).requires_grad_()]
    recorder = Recorder("eager")
    fused = run(compile_always(attention, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, run(attention, inputs), exactly(attention, inputs))
