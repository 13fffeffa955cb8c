"""The pass in Inductor's hook: `enable`, `disable`, the environment switch, and every way in at once."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator

import pytest
import torch
from entries import Runs, attention, python, qkv
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import fusion_pass
from fusion_pass.hook import FusionPass, source_hash


class UserPass(CustomGraphPass):
    """A pass of the user's: notes that it ran, and how many of ours had."""

    def __init__(self, runs: Runs | None = None) -> None:
        self.runs, self.saw = runs, []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.saw.append(len(self.runs.calls) if self.runs else 0)

    def uuid(self) -> str:
        return "a user's pass"


@pytest.fixture(autouse=True)
def untouched_config() -> Iterator[None]:
    before = config.pre_grad_custom_pass, getattr(config, "pre_grad_pass_timing", None)
    with torch._inductor.utils.fresh_cache():
        yield
    fusion_pass.disable()
    assert (config.pre_grad_custom_pass, getattr(config, "pre_grad_pass_timing", None)) == before


def compiled(**options) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(attention, **options)(*qkv())


def test_enable_and_disable_act_on_plain_torch_compile(runs: Runs) -> None:
    compiled()
    assert runs.calls == []
    fusion_pass.enable()
    torch.testing.assert_close(compiled(), attention(*qkv()))
    assert runs.calls == [("profitable", 1)]
    fusion_pass.disable()
    compiled()
    assert len(runs.calls) == 1
    fusion_pass.disable()  # twice is as good as once


def test_the_context_manager_restores_what_was(runs: Runs) -> None:
    with fusion_pass.enable(when="always"):
        compiled()
        with fusion_pass.enable():
            compiled()
        compiled()
    assert config.pre_grad_custom_pass is None
    compiled()
    assert [when for when, _ in runs.calls] == ["always", "profitable", "always"]


def test_enabling_twice_runs_the_pass_once(runs: Runs) -> None:
    fusion_pass.enable()
    fusion_pass.enable(when="always")
    compiled()
    assert runs.calls == [("always", 1)]


def test_a_wrong_when_changes_nothing() -> None:
    with pytest.raises(ValueError, match="fusion_pass: when='sometimes' is not known"):
        fusion_pass.enable(when="sometimes")
    assert config.pre_grad_custom_pass is None


@pytest.mark.parametrize("backend", ["flash", fusion_pass.flash_backend])
def test_the_hook_and_the_named_backend_run_the_pass_once(backend: object, runs: Runs) -> None:
    with fusion_pass.enable(when="always"):
        compiled(backend=backend)
    assert runs.calls == [("profitable", 1)]
    assert len(fusion_pass.last_report().sites) == 1


def test_a_pass_of_the_user_keeps_running(runs: Runs) -> None:
    user = UserPass(runs)
    config.pre_grad_custom_pass = user
    try:
        with fusion_pass.enable():
            compiled()
            compiled(backend="flash")
        assert user.saw == [0, 2]
        assert config.pre_grad_custom_pass is user
        fusion_pass.enable()
        fusion_pass.disable()
        assert config.pre_grad_custom_pass is user
        compiled()
        assert len(user.saw) == 3
        assert len(runs.calls) == 2
    finally:
        config.pre_grad_custom_pass = None


def test_passes_of_the_user_given_as_a_list_keep_running(runs: Runs) -> None:
    users = [UserPass(), UserPass()]
    config.pre_grad_custom_pass = users
    try:
        fusion_pass.enable()
        compiled()
        fusion_pass.disable()
        assert [len(user.saw) for user in users] == [1, 1]
        assert config.pre_grad_custom_pass == users
    finally:
        config.pre_grad_custom_pass = None


@pytest.mark.parametrize("way", ["hook", "backend"])
def test_a_warm_cache_is_used_and_still_reports(way: str) -> None:
    def train() -> None:
        q, k, v = (t.requires_grad_() for t in qkv())
        torch._dynamo.reset()
        counters.clear()
        torch.compile(attention, backend="inductor" if way == "hook" else fusion_pass.make_backend(when="always"))(
            q, k, v
        ).sum().backward()

    with fusion_pass.enable(when="always") if way == "hook" else contextlib.nullcontext():
        train()
        assert counters["aot_autograd"]["autograd_cache_miss"] == 1
        train()
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert len(fusion_pass.last_report().fused) == 1


def test_bodies_of_autograd_functions_are_left_alone(runs: Runs) -> None:
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return attention(q, k, v)

        @staticmethod
        def backward(ctx, grad):
            return grad, grad, grad

    q, k, v = (t.requires_grad_() for t in qkv())
    with fusion_pass.enable():
        torch.compile(lambda q, k, v: Own.apply(q, k, v) + 1)(q, k, v)
    assert len(runs.calls) == 1


def test_the_cache_key_is_the_sources_and_the_options() -> None:
    one, other = FusionPass("profitable"), FusionPass("always")
    assert one.uuid() and other.uuid() and one.uuid() != other.uuid()
    assert source_hash() in one.uuid()
    assert one.uuid() != FusionPass("profitable", (UserPass(),)).uuid()
    assert FusionPass("profitable", (print,)).uuid() is None  # a pass without a key makes ours not cacheable


def test_the_pass_is_pickled_with_the_version_of_its_sources() -> None:
    hook = FusionPass("always")
    assert pickle.loads(pickle.dumps(hook)) == hook
    assert source_hash().encode() in pickle.dumps(hook)


PLAIN = """
import torch
def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1) @ v
q = torch.ones(2, 3, 5, 4)
torch.compile(attention)(q, q, q)
"""
HOOK = "import torch, torch._inductor.config as config; print(config.pre_grad_custom_pass)"


def test_the_switch_acts_on_a_program_that_never_heard_of_us() -> None:
    done = python(PLAIN, FUSION_PASS="always", FUSION_PASS_REPORT="1")
    assert done.stderr.startswith("fusion_pass: graph 0: 1 of 1 attention sites fused\n")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("value", "hook"),
    [
        ("1", "FusionPass(when='profitable', before=())\n"),
        ("always", "FusionPass(when='always', before=())\n"),
        ("0", "None\n"),
        ("", "None\n"),
        ("off", "None\n"),
    ],
)
def test_the_values_of_the_switch(value: str, hook: str) -> None:
    done = python(HOOK, FUSION_PASS=value)
    assert done.stdout == hook
    understood = "FUSION_PASS='off' is not understood and counts as 0; use one of 0, 1, always" in done.stderr
    assert understood if value == "off" else done.stderr == ""


def test_disable_undoes_the_switch() -> None:
    code = HOOK.replace("print", "import fusion_pass; fusion_pass.disable(); print")
    assert python(code, FUSION_PASS="1").stdout == "None\n"


def test_the_switch_finds_an_inductor_that_is_there_already() -> None:
    code = (
        "import os, torch, torch._inductor.config as config\n"
        "os.environ['FUSION_PASS'] = '1'\n"
        "from fusion_pass import autoload\n"
        "autoload.activate()\n"
        "print(config.pre_grad_custom_pass)"
    )
    assert python(code).stdout == "FusionPass(when='profitable', before=())\n"


# ---------------------------------------------------------------- states


@pytest.mark.skipif(not hasattr(config, "pre_grad_pass_timing"), reason="since torch 2.13")
def test_a_timing_that_the_program_sets_stays() -> None:
    """`disable` took a timing for ours that an earlier block had long put back."""
    try:
        with fusion_pass.enable():
            assert config.pre_grad_pass_timing == "early"
        assert config.pre_grad_pass_timing == "default"
        config.pre_grad_pass_timing = "early"
        fusion_pass.enable()
        fusion_pass.disable()
        assert config.pre_grad_pass_timing == "early"
        config.pre_grad_pass_timing = "default"
        with fusion_pass.enable():
            config.pre_grad_pass_timing = "late"
        assert config.pre_grad_pass_timing == "late"
    finally:
        config.pre_grad_pass_timing = "default"


@pytest.mark.parametrize("entered", [False, True])
def test_blocks_that_end_out_of_order_leave_the_pass_off(entered: bool) -> None:
    first, second = fusion_pass.enable(when="always"), fusion_pass.enable()
    if entered:
        first.__enter__(), second.__enter__()
    first.__exit__()
    assert config.pre_grad_custom_pass == (FusionPass("profitable") if entered else None)  # the second block still runs
    second.__exit__()
    assert config.pre_grad_custom_pass is None
    second.__exit__()  # twice is as good as once


def test_what_is_enabled_inside_a_block_ends_with_it() -> None:
    fusion_pass.enable()
    with fusion_pass.enable(when="always"):
        fusion_pass.enable()
        assert config.pre_grad_custom_pass == FusionPass("profitable")
    assert config.pre_grad_custom_pass == FusionPass("profitable")
    with fusion_pass.enable(when="always") as block:
        fusion_pass.disable()
        assert config.pre_grad_custom_pass is None
    assert config.pre_grad_custom_pass is None
    with block:  # a second time
        assert config.pre_grad_custom_pass == FusionPass("always")
    assert config.pre_grad_custom_pass is None


def test_a_pass_that_the_program_sets_inside_a_block_stays() -> None:
    user = UserPass()
    try:
        with fusion_pass.enable():
            config.pre_grad_custom_pass = user
        assert config.pre_grad_custom_pass is user
    finally:
        config.pre_grad_custom_pass = None


def test_a_pass_that_came_with_loaded_settings_is_ours_to_take_out() -> None:
    config.pre_grad_custom_pass = FusionPass("always")
    with fusion_pass.enable():
        assert config.pre_grad_custom_pass == FusionPass("profitable")
    assert config.pre_grad_custom_pass == FusionPass("always")
    fusion_pass.disable()
    assert config.pre_grad_custom_pass is None


# ---------------------------------------------------------------- the switch, with our own names imported before Inductor

SHOW = "\nimport torch._inductor.config as config; print(config.pre_grad_custom_pass)"
PROFITABLE, ALWAYS = "FusionPass(when='profitable', before=())", "FusionPass(when='always', before=())"
ORDERS = {
    "never called": ("from fusion_pass import enable" + SHOW, [PROFITABLE]),
    "before torch": ("import fusion_pass.hook" + SHOW, [PROFITABLE]),
    "after torch": ("import torch; from fusion_pass import enable" + SHOW, [PROFITABLE]),
    "after Inductor": ("import torch._inductor.config; from fusion_pass import enable" + SHOW, [PROFITABLE]),
    "called": ("from fusion_pass import enable; enable('always')" + SHOW, [ALWAYS]),
    "called, then left": ("from fusion_pass import enable; enable('always').__exit__()" + SHOW, [PROFITABLE]),
    "a block": (
        f"import fusion_pass\nwith fusion_pass.enable('always'):{SHOW.replace(chr(10), ' ')}{SHOW}",
        [ALWAYS, PROFITABLE],
    ),
    "a block after Inductor": (
        f"import torch._inductor.config, fusion_pass\nwith fusion_pass.enable('always'): pass{SHOW}",
        [PROFITABLE],
    ),
    "disabled": ("from fusion_pass import disable; disable()" + SHOW, ["None"]),
    "disabled after Inductor": ("import torch._inductor.config; from fusion_pass import disable; disable()" + SHOW, ["None"]),
    "a backend": ("from fusion_pass import flash_backend, enable" + SHOW, [PROFITABLE]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_switch_holds_in_every_order_of_imports(order: str) -> None:
    code, expected = ORDERS[order]
    done = python(code, FUSION_PASS="1")
    assert done.stderr == ""
    assert done.stdout.split("\n") == [*expected, ""]


def test_the_switch_fuses_where_enable_is_imported_and_never_called() -> None:
    done = python("from fusion_pass import enable" + PLAIN, FUSION_PASS="always", FUSION_PASS_REPORT="1")
    assert done.stderr.startswith("fusion_pass: graph 0: 1 of 1 attention sites fused\n")
