"""The Triton kernels on the CPU, through Triton's interpreter, beside eager in float64.

Everything here runs in the worker process of tests/conftest.py.
bf16 is left to the GPU tests: the interpreter's bf16 products are wrong.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

NAMES = [
    "plain", "causal", "causal, finfo.min", "strictly anticausal, -1e9", "strictly anticausal, -inf", "window", "blocks, -1e4",
    "alibi", "softcap", "padding", "bias", "own bias", "lowest mask", "far", "relative", "key factor", "row factor",
    "documents", "offset", "math", "sink", "sink of rows", "softmax one", "softmax one, NaN", "deep sink",
    "infinite", "infinite, quotient", "infinite, sink", "infinite, quotient, sink", "infinite sink",
    "weight of heads", "weight of rows", "mask again", "mask again, -1e9", "causal again", "causal again, other way",
    "only the hidden", "weight of a bias", "weight beside a table", "weight and sink", "guard",
]  # fmt: skip

TILED = [
    "causal", "window", "blocks, -1e4", "strictly anticausal, -1e9", "own bias", "far", "sink", "infinite, quotient",
    "mask again",
    "only the hidden", "weight of a bias", "weight beside a table", "guard",
]  # fmt: skip


def compare(name: str, shape: tuple[int, ...], dtype: str, options: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """Runs in the worker: (what, error, eager's error, allowed error) for out, dq, dk, dv and each capture's gradient."""
    import torch
    import triton_cases

    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    results = triton_cases.compare(name, triton_cases.Shape(*shape), kind, "cpu", **options)
    names = triton_cases.OUTPUTS
    return [(w, ours, eager, triton_cases.allowed(w, eager, kind)) for w, (ours, eager) in zip(names, results, strict=False)]


def check(worker: ProcessPoolExecutor, name: str, shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> None:
    for what, ours, eager, limit in worker.submit(compare, name, shape, dtype, options).result():
        assert ours <= limit, f"{what}: error {ours:.2e}, eager {eager:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("name", NAMES)
def test_programs(worker: ProcessPoolExecutor, name: str) -> None:
    check(worker, name, (2, 2, 1, 37, 53, 16, 16))  # grouped heads, odd lengths


def compare_tiles(name: str, tma: bool, shape: tuple[int, ...]) -> list[tuple[str, float, float, float]]:
    """Runs in the worker: as `compare`, with tiles of 16 x 16, and descriptors for sequences of any length."""
    from fusion_kernels import backward, configs, forward

    before, plans = configs.SHORT, (forward._plans, backward._plans)
    configs.SHORT = 0
    for known in plans:
        known.clear()
    try:
        options = {"tile": configs.Tile(16, 16, 4, 1, tma), "transposed": False}
        return compare(name, shape, "float32", options)
    finally:
        configs.SHORT = before
        for known in plans:
            known.clear()


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_many_tiles(worker: ProcessPoolExecutor, name: str, tma: bool) -> None:
    """Four or five tiles each way, or more where each has rows of its own kind."""
    shape = (1, 1, 1, 131, 53, 16, 16) if name == "far" else (1, 2, 1, 67, 53, 16, 16)
    for what, ours, eager, limit in worker.submit(compare_tiles, name, tma, shape).result():
        assert ours <= limit, f"{what}: error {ours:.2e}, eager {eager:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize("name", ["plain", "causal, finfo.min", "bias"])
def test_dims_of_two_parts(worker: ProcessPoolExecutor, name: str) -> None:
    check(worker, name, (1, 2, 2, 65, 64, 40, 24))


@pytest.mark.parametrize("name", ["plain", "causal", "bias"])
def test_half(worker: ProcessPoolExecutor, name: str) -> None:
    check(worker, name, (1, 2, 1, 33, 47, 32, 32), "float16")


def test_low_scores_in_half(worker: ProcessPoolExecutor) -> None:
    check(worker, "low", (1, 1, 1, 129, 129, 16, 16), "float16")


@pytest.mark.parametrize("n,m", [(1, 1), (1, 70), (63, 1)])
def test_lengths(worker: ProcessPoolExecutor, n: int, m: int) -> None:
    check(worker, "plain", (2, 1, 1, n, m, 16, 16))
    check(worker, "causal, finfo.min", (2, 1, 1, n, m, 16, 16))


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout(worker: ProcessPoolExecutor, p: float) -> None:
    check(worker, "causal", (2, 2, 1, 37, 53, 16, 16), p=p)
    check(worker, "sink", (1, 4, 2, 37, 53, 16, 16), p=p)
    check(worker, "infinite, quotient", (1, 2, 2, 37, 53, 16, 16), p=p)


def test_dropout_beside_weights(worker: ProcessPoolExecutor) -> None:
    for name in ("mask again", "weight of heads", "weight of a bias", "weight beside a table", "guard"):
        check(worker, name, (2, 2, 1, 37, 53, 16, 16), p=0.25)


def stored_gradient(shared: str, slots: int, programs: int, masked: bool) -> tuple[float, float, int]:
    """Runs in the worker: (error, eager's) of the gradient of a half-precision bias, through the op; how often dq was launched.

    shared: the dims ("b", "h") along which the bias is one; slots, programs: `configs.SLOTS` and `SLOT_PROGRAMS`.
    """
    import torch
    from fusion_kernels import backward_kernels, calls, configs
    from fusion_kernels.choice import force
    from fusion_kernels.op import ATTENTION, ATTENTION_BACKWARD
    from fusion_kernels.program import SCORE, Capture, Program, apply, const, index, load

    torch.manual_seed(0)
    q, k, v, do = (torch.randn(3, 2, n, 16, dtype=torch.float16) for n in (309, 129, 129, 309))
    bias = torch.randn(1 if "b" in shared else 3, 1 if "h" in shared else 2, 309, 129, dtype=torch.float16)
    at = [const(0) if dim in shared else index(dim) for dim in "bh"]
    root = apply("add", SCORE, load(0, "float", [*at, index("q"), index("k")]))
    visible = apply("le", index("k"), index("q"))
    text = Program(apply("where", visible, root, const(float("-inf"))) if masked else root, (Capture("float", 4),)).text
    launches, was = [], (configs.SLOTS, configs.SLOT_PROGRAMS)
    calls._backwards.clear()  # plans with slots of another size
    configs.SLOTS, configs.SLOT_PROGRAMS = slots, programs
    run = backward_kernels.dq_tiles.run
    backward_kernels.dq_tiles.run = lambda *args, **kwargs: (launches.append(kwargs["grid"]), run(*args, **kwargs))[1]
    try:
        with force("triton"):
            out, lse = ATTENTION(q, k, v, [bias], [], text, 0.0, None)
            *_, (ours,) = ATTENTION_BACKWARD(do, q, k, v, [bias], [], text, 0.0, None, out, lse, [True])
    finally:
        configs.SLOTS, configs.SLOT_PROGRAMS = was
        del backward_kernels.dq_tiles.run

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        x, y, z, b = (t.to(dtype) for t in (q, k, v, bias))
        scores = x @ y.mT + b.requires_grad_()
        if masked:
            scores = scores.masked_fill(torch.ones(309, 129, dtype=torch.bool).triu(1), float("-inf"))
        (found,) = torch.autograd.grad(scores.softmax(-1) @ z, b, do.to(dtype))
        return found.double()

    exact = gradient(torch.float64)
    errors = [(found - exact).abs().max().item() for found in (ours.double(), gradient(torch.float16))]
    return errors[0], errors[1], len(launches)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "shared,slots,programs,launches",
    [
        ("", 1 << 20, 1, 1),
        ("b", 1 << 20, 1, 1),
        ("b", 1 << 19, 1, 2),
        ("b", 1, 20, 2),
        ("h", 1 << 17, 1, 8),
        ("bh", 5 << 17, 1, 2),
        ("b", 1, 2, 1),
        ("bh", 1, 5, 1),
    ],
    ids=[
        "own",
        "batches",
        "in turns",
        "heads, two tiles a turn",
        "both, a rest",
        "own, no slots",
        "batches, no slots",
        "both, no slots",
    ],
)
def test_the_gradient_of_a_table_in_its_own_dtype(
    worker: ProcessPoolExecutor, shared: str, slots: int, programs: int, launches: int, masked: bool
) -> None:
    ours, eager, times = worker.submit(stored_gradient, shared, slots, programs, masked).result()
    assert 0 < ours <= 2 * eager
    assert times == launches


def test_contiguous_memory(worker: ProcessPoolExecutor) -> None:
    check(worker, "alibi", (2, 2, 2, 32, 32, 16, 16), transposed=False)
