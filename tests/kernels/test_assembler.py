"""Which ptxas assembles the kernels: 12.8 makes wrong code of some, so that a later one is taken, or the site is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from fusion_kernels import arguments, assembler, choice

from fusion_pass import explain

HOPPER = torch.device("cuda")


@dataclass
class Tool:
    version: str

    @property
    def path(self) -> str:
        return f"/tools/{self.version}/ptxas"


def machine(monkeypatch: pytest.MonkeyPatch, *tools: str, driver: tuple[int, int] = (13, 0), capability: int = 9) -> None:
    """A machine whose Triton has these releases of ptxas: its own for Hopper, then the one for Blackwell."""
    names = ("ptxas", "ptxas_blackwell")
    knobs = SimpleNamespace(nvidia=SimpleNamespace(**dict(zip(names, map(Tool, tools), strict=False))))
    monkeypatch.setattr(assembler, "knobs", knobs)
    monkeypatch.setattr(assembler, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    clear = assembler._sound.cache_clear
    clear()
    yield
    clear()


@pytest.mark.parametrize(
    "tools,driver,taken",
    [
        (("12.9", "13.1"), (13, 0), "12.9"),  # Triton's own is sound
        (("12.8", "12.9"), (12, 8), "12.9"),  # Triton 3.6
        (("12.8", "13.1"), (13, 0), "13.1"),  # Triton 3.7
        (("12.8", "13.1"), (12, 8), None),  # ... with a driver that may not load what it makes
        (("12.10", "13.1"), (12, 8), "12.10"),  # ten is more than nine
        (("12.8",), (13, 0), None),
        (("12.9", "13.1"), (0, 0), "12.9"),  # what Triton uses anyway does not wait for a driver that cannot be asked
        (("12.8", "12.9"), (0, 0), None),
    ],
)
def test_the_first_sound_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, tools: tuple[str, ...], driver: tuple[int, int], taken: str | None
) -> None:
    machine(monkeypatch, *tools, driver=driver)
    tool = assembler._sound()
    assert (tool and tool.version) == taken
    assert (assembler.trouble(HOPPER) is None) == (taken is not None)


def test_what_is_said_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "12.8")
    seen, needed = assembler.trouble(HOPPER) or ("", "")
    assert seen == "ptxas 12.8, which makes wrong machine code of some kernels for this GPU"
    assert needed == "ptxas 12.9 or later that the driver can load code of: update Triton, or set TRITON_PTXAS_PATH to one"
    q = SimpleNamespace(device=HOPPER)
    with pytest.raises(RuntimeError, match=r"fusion_kernels: ptxas 12\.8, .*; needed: ptxas 12\.9 or later"):
        arguments.check(q, q, q)  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", [8, 10])
def test_other_gpus_do_not_need_it(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    machine(monkeypatch, "12.8", capability=capability)
    assert assembler.trouble(HOPPER) is None


def test_a_site_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "trouble", lambda device: ("an assembler of yesterday", "one of today"))
    q = torch.randn(1, 2, 63, 8)
    report = explain(lambda q: (q @ q.transpose(-1, -2)).softmax(-1) @ q, q)
    assert not report.fused
    assert "an assembler of yesterday" in str(report) and "one of today" in str(report)


def test_tritons_setting_is_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tool = knobs.nvidia.ptxas_blackwell
    monkeypatch.setattr(assembler, "_sound", lambda: tool)
    before = knobs.nvidia.ptxas.path
    with assembler.chosen():
        assert knobs.nvidia.ptxas.path == tool.path
    assert knobs.nvidia.ptxas.path == before
    assert "TRITON_PTXAS_PATH" not in os.environ
