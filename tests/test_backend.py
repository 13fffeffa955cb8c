"""The named backend: what torch.compile hands it, what it hands on, and what it says to a wrong argument."""

from __future__ import annotations

import pytest
import torch
from entries import Runs, attention, qkv
from torch._dynamo.testing import CompileCounterWithBackend

import fusion_pass
from fusion_pass import flash_backend, make_backend


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_every_inner_backend_gets_the_graph(inner: str, runs: Runs) -> None:
    compiled = torch.compile(attention, backend=make_backend(inner=inner))
    torch.testing.assert_close(compiled(*qkv()), attention(*qkv()))
    assert runs.calls == [("profitable", 1)]


def test_a_callable_as_inner_gets_the_graph_after_the_pass(runs: Runs) -> None:
    inner = CompileCounterWithBackend("eager")
    torch.compile(attention, backend=make_backend(inner=inner, when="always"))(*qkv())
    assert runs.calls == [("always", 1)]
    assert inner.frame_count == 1


def test_the_name_flash_is_the_backend_with_inductor(runs: Runs) -> None:
    assert "flash" in torch._dynamo.list_backends()
    torch.testing.assert_close(torch.compile(attention, backend="flash")(*qkv()), attention(*qkv()))
    assert runs.calls == [("profitable", 1)]


def test_backends_made_alike_share_compiled_code(runs: Runs) -> None:
    assert make_backend() == flash_backend
    assert make_backend(when="always") != flash_backend
    for _ in range(2):
        torch.compile(attention, backend=make_backend(inner="eager"))(*qkv())
    assert len(runs.calls) == 1


def test_mode_and_options_reach_inductor_as_without_us(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compile_fx(gm, inputs, **kwargs):
        seen.append(kwargs["config_patches"])
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    arguments = [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue-fusion": False}}, {"mode": "default"}, {}]
    for backend in (flash_backend, "inductor"):
        for given in arguments:
            torch._dynamo.reset()
            torch.compile(attention, backend=backend, **given)(*qkv())
    assert seen[:4] == seen[4:]
    assert seen[0]["max_autotune"] is True
    assert seen[1]["epilogue_fusion"] is False
    assert seen[2] == seen[3] == {}


def test_dynamic_shapes_and_fullgraph_mean_what_they_mean(runs: Runs) -> None:
    compiled = torch.compile(attention, backend=make_backend(inner="eager"), dynamic=True, fullgraph=True)
    for n in (5, 6, 9):
        torch.testing.assert_close(compiled(*qkv(n)), attention(*qkv(n)))
    assert len(runs.calls) == 1

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x.sin()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(broken, backend=make_backend(inner="eager"), fullgraph=True)(torch.ones(3))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"mode": "max-autotun"}, "fusion_pass: unknown mode 'max-autotun'; did you mean 'max-autotune'"),
        ({"mode": "quick"}, "fusion_pass: unknown mode 'quick'; use one of 'default'"),
        ({"options": {"max_autotuning": True}}, "fusion_pass: unknown option 'max_autotuning'; did you mean 'max_autotune'"),
        ({"options": {"zzz": 1}}, "fusion_pass: unknown option 'zzz'; options= takes Inductor's options"),
        ({"options": {"max_autotune": "yes"}}, "were refused by Inductor: Unexpected type of attr max_autotune"),
    ],
)
def test_an_unknown_mode_or_option_is_a_clear_error(given: dict, text: str, runs: Runs) -> None:
    with pytest.raises(Exception, match=text):
        torch.compile(attention, backend=flash_backend, **given)(*qkv())
    assert runs.calls == []


def test_options_for_an_inner_backend_that_takes_none(runs: Runs) -> None:
    def inner(gm, inputs):
        return gm.forward

    with pytest.raises(Exception, match=r"fusion_pass: options=.* was given, but the inner backend .* takes no options="):
        torch.compile(attention, backend=make_backend(inner=inner), options={"max_autotune": True})(*qkv())


def test_options_reach_an_inner_backend_that_takes_them(runs: Runs) -> None:
    seen = []

    def inner(gm, inputs, options=None):
        seen.append(options)
        return gm.forward

    torch.compile(attention, backend=make_backend(inner=inner), options={"anything": 3})(*qkv())
    assert seen == [{"anything": 3}]


def test_wrong_arguments_of_make_backend() -> None:
    with pytest.raises(ValueError, match="fusion_pass: when='never' is not known; use one of 'profitable', 'always'"):
        make_backend(when="never")
    with pytest.raises(TypeError, match="fusion_pass: inner=3 is a int; use the name of a Dynamo backend"):
        make_backend(inner=3)  # type: ignore[arg-type]


def test_an_unknown_name_fails_as_in_torch_compile(runs: Runs) -> None:
    with pytest.raises(Exception, match="no_such_backend"):
        torch.compile(attention, backend=make_backend(inner="no_such_backend"))(*qkv())


def test_reset_drops_compiled_code_and_nothing_else(runs: Runs) -> None:
    compiled = torch.compile(attention, backend=make_backend(inner="eager"))
    compiled(*qkv())
    torch._dynamo.reset()
    compiled(*qkv())
    assert len(runs.calls) == 2


def test_public_names() -> None:
    for name in fusion_pass.__all__:
        assert getattr(fusion_pass, name) is not None
        assert name in dir(fusion_pass)
    with pytest.raises(AttributeError, match="module 'fusion_pass' has no attribute 'flush'"):
        fusion_pass.flush  # noqa: B018
