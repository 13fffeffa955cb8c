"""Every search function of torch's own attention fusion (torch/_inductor/fx_passes/fuse_attention.py) fuses here and is right.

The functions, their example arguments and their variants (fp32 and half, batch of one, inference and training) are taken from the
installed module, not copied: one that a later torch adds is tested here the day it is installed.
"""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from checks import Recorder, assert_fused, assert_rule, compile_always, exactly, run
from torch import Tensor
from torch._inductor.fx_passes import fuse_attention

import fusion_pass

DROPOUT = "dropout_p"


def traceable(source: ModuleType) -> ModuleType:
    """A module with the same globals, its functions under another file name: Dynamo does not look into torch's own files."""
    copy = sys.modules["traceable_patterns"] = ModuleType("traceable_patterns")  # where guards look a global up
    vars(copy).update({k: v for k, v in vars(source).items() if not k.startswith("__")}, __builtins__=builtins)
    for name, value in vars(source).items():
        if isinstance(value, FunctionType) and name.startswith("_sfdp_pattern"):
            code = value.__code__.replace(co_filename=__file__)
            setattr(copy, name, FunctionType(code, vars(copy), name, value.__defaults__))
    return copy


FUNCTIONS = {k: v for k, v in vars(traceable(fuse_attention)).items() if re.fullmatch(r"_sfdp_pattern_\d+", k)}


def variants() -> dict[str, dict[str, Any]]:
    """name -> search function's name, example arguments, numbers; as the module would register them for the CPU."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in fuse_attention._get_sfdp_patterns(torch.device("cpu")):
        numbers = dict(entry["scalar_workaround"])
        if name.endswith("_inference"):
            numbers.update({DROPOUT: 0.0} if _takes_dropout(entry["search_fn"].__name__) else {})
        found[name] = {"fn": entry["search_fn"].__name__, "args": entry["example_inputs"], "numbers": numbers}
    return found


def _takes_dropout(name: str) -> bool:
    code = FUNCTIONS[name].__code__
    return DROPOUT in code.co_varnames[: code.co_argcount]


VARIANTS = variants()


def fill(example: Tensor, generator: torch.Generator, training: bool) -> Tensor:
    """Values for an example argument, which has a shape, strides and a dtype, and no values; a 0-d scale keeps its own."""
    if example.dim() == 0:
        return example
    if example.shape[0] > 64:
        example = example[:3]  # a batch of 1024 is no news
    if example.dtype == torch.bool or example.dim() == 2:  # a mask of what to keep
        kept = torch.rand(example.shape, generator=generator) < 0.7
        kept[..., 0] = True
        return kept.to(example.dtype)
    values = torch.randn(example.shape, generator=generator).to(example.dtype)
    out = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype).copy_(values)
    return out.requires_grad_(example.requires_grad and training)


def prepare(name: str, dropout: float | None = None) -> tuple[Callable[..., Any], list[Tensor]]:
    """The variant's function, its numbers bound, and its inputs; `dropout` replaces the module's rate."""
    entry = VARIANTS[name]
    fn, numbers = FUNCTIONS[entry["fn"]], dict(entry["numbers"])
    if DROPOUT in numbers and dropout is not None:
        numbers[DROPOUT] = dropout
    generator = torch.Generator().manual_seed(5)
    inputs = [fill(x, generator, name.endswith("_training")) for x in entry["args"]]
    return (lambda *args: fn(*args, **numbers)), inputs


def test_every_search_function_is_covered() -> None:
    assert len(FUNCTIONS) >= 25, "torch's file has changed its names"
    assert {entry["fn"] for entry in VARIANTS.values()} == set(FUNCTIONS)
    assert {entry["args"][0].dtype for entry in VARIANTS.values()} == {torch.float32, torch.float16}


@pytest.mark.parametrize("name", VARIANTS)
def test_fuses_and_is_right(name: str) -> None:
    fn, inputs = prepare(name, dropout=0.0)
    eager = run(fn, inputs)
    recorder = Recorder("aot_eager")
    fused = run(compile_always(fn, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, eager, exactly(fn, inputs), name)


@pytest.mark.parametrize("name", [name for name, entry in VARIANTS.items() if entry["numbers"].get(DROPOUT)])
def test_fuses_with_its_dropout(name: str) -> None:
    """In training the module's rate is used: one site, that rate in it, the same seed the same result, finite gradients."""
    fn, inputs = prepare(name)
    recorder = Recorder("aot_eager")
    compiled = compile_always(fn, recorder)
    torch.manual_seed(1)
    first = run(compiled, inputs)
    torch.manual_seed(1)
    second = run(compiled, inputs)
    report = fusion_pass.last_report()
    assert_fused(report, recorder, 1)
    site = report.fused[0].attention
    assert site is not None and site.dropout_p == VARIANTS[name]["numbers"][DROPOUT]
    for (what, x), (_, y) in zip(first.named(), second.named(), strict=True):
        assert (x is None and y is None) or (torch.equal(x, y) and bool(x.isfinite().all())), what


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_bfloat16(name: str) -> None:
    """Not among the module's variants, but what its users run: the first half variant of each function in bf16."""
    variant = next(v for v, entry in VARIANTS.items() if entry["fn"] == name and entry["args"][0].dtype == torch.float16)
    fn, inputs = prepare(variant, dropout=0.0)
    inputs = [x.detach().bfloat16().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    recorder = Recorder("aot_eager")
    eager = run(fn, inputs)
    fused = run(compile_always(fn, recorder), inputs)
    assert_fused(fusion_pass.last_report(), recorder, 1)
    assert_rule(fused, eager, exactly(fn, inputs), name)
