"""One way of one model of models.py: compiled, and its training steps timed."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from models_cases import MODELS, build
from torch import Tensor

__all__ = ["WAYS", "Result", "Steps", "exists", "measure"]

# What is compiled, and by whom: (how the attention is written, whether our backend compiles it).
WAYS = {"ours": ("eager", True), "compile": ("eager", False), "sdpa": ("sdpa", False), "ours+sdpa": ("sdpa", True)}
STEPS = (10, 30)  # timed steps, at least and at most
ENOUGH_MS = 1000.0  # of timed steps; no more than `STEPS[0]` of them where they take longer
WARM_MS = 400.0  # of steps before those: the clocks are up and the allocator has its blocks


@dataclass
class Result:
    """What was found of one way of one model.

    word: empty when it was timed, else why there is no time ("-", "OOM", "late", "error", "missing", "no timm"; "compiled" while
    it waits for the GPU); why: the same for a reader. ms: of a step, the median. peak_bytes: of memory in a step, weights and
    gradients included. loss, gradient: of the first step, and the norm of all its gradients. compiling: seconds of that step.
    fused, sites: how many attentions the pass replaced, and saw; left: why not the others. kernels: what runs the fused.
    """

    model: str
    way: str
    word: str = ""
    why: str = ""
    ms: float | None = None
    peak_bytes: int | None = None
    steps: int = 0
    loss: float | None = None
    gradient: float | None = None
    compiling: float | None = None
    fused: int | None = None
    sites: int | None = None
    left: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)


class Steps:
    """Training steps in bf16 autocast: gradients to none, forward, backward, and no optimizer."""

    def __init__(self, name: str, way: str, tiny: bool) -> None:
        self.device = torch.device("cpu" if tiny else "cuda")
        source, self.ours = WAYS[way]
        self.module, self.inputs = build(name, source, tiny, self.device)
        self.compiled = torch.compile(self.module, backend=_backend(self.ours, tiny))

    def once(self) -> Tensor:
        """One step; returns its loss."""
        self.forget()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.compiled(**self.inputs)
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        self.module.zero_grad(set_to_none=True)
        for x in self.inputs.values():
            x.grad = None

    def first(self, result: Result) -> None:
        """Compile, which is the first step, and note what it gives."""
        started = time.perf_counter()
        loss = self.once().item()
        result.compiling = time.perf_counter() - started
        norms = [p.grad.norm() for p in self.module.parameters() if p.grad is not None]
        result.loss, result.gradient = loss, torch.stack(norms).norm().item()
        if not self.ours:
            return
        import fusion_pass

        report = fusion_pass.last_report()
        result.fused, result.sites = len(report.fused), len(report.sites)
        refused = Counter(f"{v.reason.value if v.reason else ''}: {v.seen}" for v in (s.verdict for s in report.refused))
        result.left = [f"{count} x {text}" for text, count in refused.most_common()]
        kernels = Counter("/".join(dict.fromkeys((s.verdict.kernel, s.verdict.backward))) for s in report.fused)
        result.kernels = [f"{count} x {text.rstrip('/')}" for text, count in kernels.most_common()]

    def release(self) -> None:
        """Leave the memory to others, but for weights and inputs."""
        self.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def timed(self, result: Result) -> None:
        """Time steps one behind the other, as in training: the host runs ahead of the GPU where it can."""
        cuda = self.device.type == "cuda"
        spent, warm = 0.0, 0
        each = 0.0
        while warm < 3 or (cuda and spent < WARM_MS):
            started = time.perf_counter()
            self.once().item()
            each = (time.perf_counter() - started) * 1e3
            spent, warm = spent + each, warm + 1
        steps = min(max(math.ceil(ENOUGH_MS / each), STEPS[0]), STEPS[1]) if cuda else 3
        times = self._on_gpu(steps) if cuda else self._on_cpu(steps)
        result.ms, result.steps = statistics.median(times), steps
        result.peak_bytes = torch.cuda.max_memory_allocated() if cuda else None

    def _on_gpu(self, steps: int) -> list[float]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            self.once()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]

    def _on_cpu(self, steps: int) -> list[float]:
        clock = [time.perf_counter()]
        for _ in range(steps):
            self.once()
            clock.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in pairwise(clock)]


def _backend(ours: bool, tiny: bool) -> Any:
    """Inductor, with the pass before it or without; a tiny model is for trying the code, and compiled by nobody."""
    if not ours:
        return "eager" if tiny else "inductor"
    import fusion_pass

    return fusion_pass.make_backend(inner="eager", when="always") if tiny else fusion_pass.flash_backend


def exists(name: str, way: str) -> bool:
    """Whether the library has the source that this way compiles."""
    return MODELS[name].sdpa or WAYS[way][0] != "sdpa"


def measure(name: str, way: str, tiny: bool, compiled: Callable[[Result], bool]) -> Result:
    """Compile one way of one model, and time it when `compiled` returns true; nothing that goes wrong is raised.

    Other processes may compile on the same GPU until then: memory that was lacking beside them is asked for again, alone.
    """
    result = Result(name, way)
    if not exists(name, way):
        result.word = "-"
        return result
    try:
        with _backward_compiled_early():
            steps = Steps(name, way, tiny)
            _first(steps, result, alone=False)
            steps.release()
            result.word = "compiled"
            if not compiled(result):
                return result
            if result.loss is None:
                _first(steps, result, alone=True)
            steps.timed(result)
        result.word = result.why = ""
    except Exception as error:
        traceback.print_exc()
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        result.word = f"no {missing}" if missing else "OOM" if _out_of_memory(error) else "error"
        result.why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return result


def _first(steps: Steps, result: Result, alone: bool) -> None:
    try:
        steps.first(result)
    except Exception as error:
        if alone or not _out_of_memory(error):
            raise
        result.why = "out of memory beside others"


def _out_of_memory(error: Exception) -> bool:
    """The compiler wraps errors of what it runs in its own; cuBLAS has a word of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in ("out of memory", "ALLOC_FAILED"))


def _backward_compiled_early() -> contextlib.AbstractContextManager[object]:
    """The code is the same; but all that the forward saves would else be held, beside others, while the backward compiles."""
    from torch._functorch import config

    name = "force_non_lazy_backward_lowering"
    return config.patch({name: True}) if hasattr(config, name) else contextlib.nullcontext()
