"""The second call of a plan, which goes to the binaries with addresses, without a GPU: a binary that is interpreted.

It makes the tensors again that lie at the addresses, as the first call's tensors lay, and runs the interpreted kernel on them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import key_mask_cases
import pair_mask_cases
import torch
import triton_cases
from fusion_kernels.launch import Launch
from triton import knobs
from triton.compiler import CompiledKernel

FUNCTION, METADATA = object(), object()


def _there(address: Any, first: Any) -> Any:
    """What lies at an address (or at those of a tuple); anything else has to be what it was."""
    if isinstance(first, tuple):
        return tuple(_there(a, f) for a, f in zip(address, first, strict=True))
    if not isinstance(first, torch.Tensor) or isinstance(address, torch.Tensor):
        assert type(address) is type(first), (address, first)
        return address
    assert type(address) is int
    elements = 1 + sum((n - 1) * step for n, step in zip(first.shape, first.stride(), strict=True))
    memory = (ctypes.c_uint8 * (elements * first.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=first.dtype).as_strided(first.shape, first.stride())


class Binary(CompiledKernel):
    """As `Launch` sees it: function, packed_metadata, run, and [grid]."""

    function, packed_metadata = FUNCTION, METADATA

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        self.kernel, self.grid, self.first = kernel, grid, arguments
        self.calls: list[str] = []

    def _interpret(self, arguments: tuple[Any, ...]) -> None:
        changing = tuple(_there(a, f) for a, f in zip(arguments, self.first, strict=False))
        self.kernel[self.grid](*changing, *arguments[len(changing) :])

    @property
    def run(self) -> Any:
        def run(x: int, y: int, z: int, stream: Any, function: Any, metadata: Any, *rest: Any) -> None:
            assert ((x, y, z), stream, function, metadata, rest[:3]) == (self.grid, None, FUNCTION, METADATA, (None,) * 3)
            self.calls.append("direct")
            self._interpret(rest[3:])

        return run

    def __getitem__(self, grid: Any) -> Any:
        def offered(*arguments: Any, stream: Any) -> None:
            assert grid == self.grid and stream is None
            self.calls.append("offered")
            self._interpret(arguments)

        return offered


class Foreign(Binary):
    """Of a Triton that launches in another way."""

    @property
    def packed_metadata(self) -> Any:
        raise AttributeError("packed_metadata")


@contextmanager
def binaries(kind: type[Binary] = Binary) -> Iterator[list[Binary]]:
    """Every kernel that is launched inside for the first time has a binary from then on."""
    made: list[Binary] = []
    first = Launch._first

    def compiled(self: Launch, *arguments: Any) -> Binary:
        first(self, *arguments)
        made.append(kind(self.kernel, self.grid, arguments))
        return made[-1]

    Launch._first = compiled  # type: ignore[method-assign]
    try:
        yield made
    finally:
        Launch._first = first  # type: ignore[method-assign]


@contextmanager
def second_calls(number: int | None = None) -> Iterator[None]:
    """Inside, `triton_cases.fused` gives what the second of two calls gave; number: of kernels in both directions."""
    once = triton_cases.fused

    def twice(*arguments: Any) -> list[torch.Tensor]:
        with binaries() as made:
            once(*arguments)
            results = once(*arguments)
        assert len(made) == (number or len(made)) > 0
        assert all(binary.calls == ["direct"] for binary in made), [binary.calls for binary in made]
        return results

    triton_cases.fused = twice
    try:
        yield
    finally:
        triton_cases.fused = once


def compare(name: str, shape: tuple[int, ...], **options: Any) -> list[str]:
    """What is wrong with the results of the second call, a line each."""
    with second_calls():
        results = triton_cases.compare(name, triton_cases.Shape(*shape), torch.float32, "cpu", **options)
    return [
        f"{what}: error {ours:.2e}, eager {eager:.2e}"
        for what, (ours, eager) in zip(triton_cases.OUTPUTS, results, strict=False)
        if not ours <= triton_cases.allowed(what, eager, torch.float32)
    ]


def padded(**options: Any) -> list[str]:
    """The same for a call that asks which keys padding hides, once in each direction."""
    with second_calls(7):
        return key_mask_cases.compare(key_mask_cases.Padded(**options))


def paired(**options: Any) -> list[str]:
    """The same for a call that asks which pairs tensors hide, with two kernels in each direction."""
    with second_calls(9):
        return pair_mask_cases.compare(pair_mask_cases.Paired(**options))


def through_the_op() -> list[list[str]]:
    """How the binaries of the op were called the second and the third time, and in between with a hook."""
    from fusion_kernels.choice import force
    from fusion_kernels.op import ATTENTION, ATTENTION_BACKWARD
    from fusion_kernels.program import SCORE, Program

    torch.manual_seed(0)
    q, k, v, do = (torch.randn(2, 2, 37, 16) for _ in range(4))

    def listen(metadata: Any) -> None:
        pass

    def both() -> list[torch.Tensor]:
        out, lse = ATTENTION(q, k, v, [], [], Program(SCORE).text, 0.0, None)
        dq, dk, dv, none = ATTENTION_BACKWARD(do, q, k, v, [], [], Program(SCORE).text, 0.0, None, out, lse, [])
        assert none == []
        return [out, lse, dq, dk, dv]

    with force("triton"), binaries() as made:
        results = [both(), both()]
        knobs.runtime.launch_enter_hook.add(listen)
        try:
            results.append(both())
        finally:
            knobs.runtime.launch_enter_hook.remove(listen)
        results.append(both())
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again, strict=True))
    return [binary.calls for binary in made]


def foreign() -> list[str]:
    """How the binary of another Triton was called the second time."""
    shape = triton_cases.Shape(1, 2, 1, 17, 19, 16, 16)
    case, x = triton_cases.CASES["causal"](shape), triton_cases.operands(shape, torch.float32, "cpu")
    with binaries(Foreign) as made:
        first, second = (triton_cases.fused(x, case, case.captures) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return [call for binary in made for call in binary.calls]
