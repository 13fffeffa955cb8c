"""Errors inside the pass: the user's compile goes on with the graph as it came, and the report says what happened."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from entries import attention, qkv

import fusion_pass
from fusion_pass.rewrite import Splicer
from fusion_pass.site import Reason


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("a mistake of ours")


def bodies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fusion_pass.pipeline._bodies", broken)


def imports(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "fusion_pass.pipeline", None)


def tracing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fusion_pass.pipeline.trace", broken)


def deciding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("fusion_pass.pipeline.legality.check", broken)


def finishing(patch: pytest.MonkeyPatch) -> None:
    """After the op is in its place, before what it replaces is gone."""
    patch.setattr(Splicer, "finish", broken)


PLACES = [bodies, imports, tracing, deciding, finishing]


class Inner:
    """A backend that keeps the graph that it is handed."""

    def __init__(self) -> None:
        self.code = ""

    def __call__(self, gm: torch.fx.GraphModule, inputs: object) -> Callable:
        self.code = gm.print_readable(print_output=False)
        gm.graph.lint()
        return gm.forward


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSION_PASS_STRICT", raising=False)
    torch._dynamo.reset()


def compiled(backend: object) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(attention, backend=backend)(*qkv())  # type: ignore[arg-type]


@pytest.mark.parametrize("place", PLACES)
def test_an_error_leaves_the_graph_as_it_was(place: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    untouched, inner = Inner(), Inner()
    compiled(untouched)
    place(monkeypatch)
    torch.testing.assert_close(compiled(fusion_pass.make_backend(inner=inner, when="always")), attention(*qkv()))
    assert inner.code == untouched.code
    (site,) = fusion_pass.last_report().sites
    assert not site.verdict.fused and site.verdict.reason is Reason.INTERNAL
    error = "ModuleNotFoundError: import of fusion_pass.pipeline" if place is imports else "ZeroDivisionError: a mistake of ours"
    assert site.verdict.seen.startswith(error)
    text = str(fusion_pass.last_report())
    assert "the pass failed on this site" in text and "needed   a report of this error; FUSION_PASS_STRICT=1 shows where" in text


@pytest.mark.parametrize("place", PLACES)
def test_strict_mode_lets_it_through(place: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch)
    monkeypatch.setenv("FUSION_PASS_STRICT", "1")
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"fusion_pass\.pipeline|a mistake of ours"):
        compiled(fusion_pass.make_backend(inner="eager", when="always"))


def test_an_error_in_the_report_does_not_stop_the_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("FUSION_PASS_REPORT", "1")
    monkeypatch.setattr("fusion_pass.report._show", broken)
    torch.testing.assert_close(compiled(fusion_pass.make_backend(inner="eager", when="always")), attention(*qkv()))
    assert "fusion_pass: the report of a graph failed, its code is right: ZeroDivisionError" in capsys.readouterr().err
    assert len(fusion_pass.last_report().fused) == 1


def test_a_composite_call_that_was_opened_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = torch.nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    untouched, inner, fused = Inner(), Inner(), Inner()

    def run(backend: object) -> torch.Tensor:
        torch._dynamo.reset()
        return torch.compile(lambda x: module(x, x, x, need_weights=True)[0], backend=backend)(x)  # type: ignore[arg-type]

    expected = run(untouched)
    run(fusion_pass.make_backend(inner=fused, when="always"))
    assert fused.code != untouched.code, "the call is opened where nothing fails"
    finishing(monkeypatch)
    torch.testing.assert_close(run(fusion_pass.make_backend(inner=inner, when="always")), expected)
    assert inner.code == untouched.code
