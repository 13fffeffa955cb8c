"""One peer on one problem: built, checked against float64, timed forward and backward, its peak memory taken.

A peer that fails, or cannot say the case, becomes one word in the table; the whole reason is in the JSON.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch._functorch.config
from benchmark_cases import CASES, Case, Inputs
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fusion_pass

__all__ = ["COMPILED", "PEERS", "Errors", "Problem", "Result", "Settings", "exact", "measure", "quiet"]

SLOW_MS = 1000.0  # a peer that takes longer is not asked for more work of the same kind
CALLS = (5, 20)  # that a median is taken of, at least and at most
HELD_CALLS = 40  # at most, of short ones on a GPU
HELD_CYCLES = 4_000_000  # of the device, some 2 ms: longer than any peer's launches take the host
CACHE_BYTES = 256 << 20  # larger than the device's cache
SLOW_CALLS = 3  # the least where one takes more than SLOW_MS
DRAWS = 16  # of a random program, to compare its mean


@dataclass(frozen=True)
class Problem:
    """One row of the table. A problem that `trains` is a training step of a long sequence, of eager and ours alone."""

    case: str
    b: int
    h: int
    n: int
    d: int
    trains: bool = False

    @property
    def work(self) -> int:
        return self.b * self.h * self.n * self.n * self.d


@dataclass(frozen=True)
class Settings:
    """What is the same for every row.

    limit: seconds a peer may take, compile and all. rep_ms: milliseconds to spend on the calls that a median is taken of.
    ours: the implementation that the fused op is held to, "" for the one that it chooses itself. host: the time of short calls
    on a GPU is what they take from an idle host on, launches and all, not what they take on the device.
    """

    device: torch.device
    dtype: torch.dtype
    inner: str = "inductor"
    limit: float = 90.0
    rep_ms: int = 50
    autotune: bool = False
    ours: str = ""
    host: bool = False


@dataclass
class Result:
    """Milliseconds and bytes; or, in `word`, why there are none. errors: relative, of out and of each gradient.

    kernel: of ours, what the report says will run.
    """

    forward_ms: float | None = None
    backward_ms: float | None = None
    peak_bytes: int | None = None
    errors: list[float] = field(default_factory=list)
    word: str = ""
    why: str = ""
    kernel: str = ""


class Unsaid(Exception):
    """The peer has no words for the case."""


class Unfused(Exception):
    """The pass left the plain source as it was: its time would be that of the compiler alone."""


class Late(BaseException):
    """The time limit; not an Exception, so that no compiler takes it for a failure of its own."""


# ---------------------------------------------------------------- the peers

Call = Callable[[], Tensor]


def _eager(case: Case, x: Inputs, settings: Settings) -> Call:
    return lambda: case.source(*x.arguments)


def _compile(case: Case, x: Inputs, settings: Settings) -> Call:
    call = torch.compile(case.source, dynamic=False, fullgraph=True)
    return lambda: call(*x.arguments)


def _ours(case: Case, x: Inputs, settings: Settings) -> Call:
    backend = fusion_pass.make_backend(inner=settings.inner, when="always")
    call = torch.compile(case.source, backend=backend, dynamic=False, fullgraph=True)
    call(*x.arguments)
    report = fusion_pass.last_report()
    if len(report.fused) != 1 or report.refused:
        raise Unfused(str(report))
    return lambda: call(*x.arguments)


def _sdpa(backend: str) -> Callable[[Case, Inputs, Settings], Call]:
    def build(case: Case, x: Inputs, settings: Settings) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if case.sdpa is None:
            raise Unsaid
        arguments = case.sdpa(x)

        def call() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return scaled_dot_product_attention(x.q, x.k, x.v, **arguments)

        return call

    return build


def _flex(case: Case, x: Inputs, settings: Settings) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.flex is None:
        raise Unsaid
    words, (b, _, n, _) = case.flex(x), x.q.shape
    blocks = None
    if words.mask_mod is not None:
        blocks = create_block_mask(words.mask_mod, b if words.by_batch else None, None, n, n, device=str(settings.device))
    mode = "max-autotune-no-cudagraphs" if settings.autotune else None
    call = torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)
    return lambda: call(x.q, x.k, x.v, score_mod=words.score_mod, block_mask=blocks, enable_gqa=case.group > 1)  # type: ignore[return-value]


PEERS: dict[str, Callable[[Case, Inputs, Settings], Call]] = {
    "ours": _ours,
    "flex": _flex,
    "eager": _eager,
    "compile": _compile,
    "flash": _sdpa("FLASH_ATTENTION"),
    "cudnn": _sdpa("CUDNN_ATTENTION"),
    "efficient": _sdpa("EFFICIENT_ATTENTION"),
}
COMPILED = ("ours", "flex", "compile")


# ---------------------------------------------------------------- correctness, on one head


@dataclass(frozen=True)
class Errors:
    """What float64 gives for one head, and how far eager in the benchmark's own dtype is from it."""

    values: list[Tensor]
    eager: list[float]

    def of(self, found: Sequence[Tensor]) -> list[float]:
        """Relative errors ‖found − exact‖ / ‖exact‖, of out and of each gradient that was found."""
        return [((a.double() - ref).norm() / ref.norm()).item() for a, ref in zip(found, self.values, strict=False)]


def exact(case: Case, x: Inputs) -> Errors:
    """The reference of `measure`: eager on one head, in float64 and in the inputs' own dtype."""
    head = case.one_head(x)
    wide, same = head.fresh(torch.float64), head.fresh()
    source = case.expected or case.source
    errors = Errors([t.detach() for t in _step(lambda: source(*wide.arguments), wide)], [])
    errors.eager.extend(errors.of(_mean(case, lambda: _step(lambda: case.source(*same.arguments), same))))
    return errors


def _step(call: Call, x: Inputs) -> list[Tensor]:
    """Out and the gradients of one training step."""
    out = call()
    return [out, *(torch.autograd.grad(out, x.leaves, x.do) if out.requires_grad else ())]


def _mean(case: Case, step: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What `step` gives; of a random program the mean of `DRAWS` steps, which nears what is expected of it."""
    if case.expected is None:
        return [t.detach() for t in step()]
    draws = [[t.detach().double() for t in step()] for _ in range(DRAWS)]
    return [torch.stack(values).mean(0) for values in zip(*draws, strict=True)]


def _head_of(case: Case, x: Inputs, values: list[Tensor]) -> list[Tensor]:
    names = [i for i, t in enumerate(x.arguments) if t.requires_grad]
    return [values[0][:, : case.group], *(case.one_head_gradient(i, g) for i, g in zip(names, values[1:], strict=False))]


# ---------------------------------------------------------------- one peer, measured


def measure(
    peer: str, problem: Problem, x: Inputs, settings: Settings, errors: Errors | None, only_compile: bool = False
) -> Result:
    """Everything of one peer on one problem, or only one step of it; its failures are words in the result.

    Args:
        errors: from `exact`; None leaves the check out. only_compile: fills the caches on disk and times nothing.
    """
    result, case = Result(), CASES[problem.case]
    y = x.fresh()
    if peer == "flex" and settings.device.type == "cpu":  # has no backward there
        y = y.detached()
    try:
        with _limit(settings.limit), quiet(), _held_to(settings.ours if peer == "ours" else ""):
            call = PEERS[peer](case, y, settings)
            if peer == "ours":
                result.kernel = fusion_pass.last_report().fused[0].verdict.kernel
            if errors is not None and peer != "eager":
                found = _mean(case, lambda: [t.clone() for t in _head_of(case, y, _step(call, y))])
                result.errors = errors.of(found)
            if only_compile:
                _step(call, y)
            else:
                _time(result, call, y, settings)
    except (Exception, Late) as error:
        result.word, result.why = _word(error), f"{type(error).__name__}: {error}"[:600]
    if peer in COMPILED:
        torch._dynamo.reset()
    _free(settings.device)
    return result


def _time(result: Result, call: Call, y: Inputs, settings: Settings) -> None:
    trains = bool(y.leaves)
    _step(call, y)
    if settings.device.type == "cuda":
        _free(settings.device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(call, y)
        torch.cuda.synchronize()
        result.peak_bytes = torch.cuda.max_memory_allocated() - before
    result.forward_ms = _median_ms(call, settings)
    if trains:
        out = call()
        result.backward_ms = _median_ms(lambda: torch.autograd.grad(out, y.leaves, y.do, retain_graph=True), settings)


def _median_ms(call: Callable[[], object], settings: Settings) -> float:
    """Median milliseconds of the calls that fit into `rep_ms`, after one that is not counted; of three calls at least."""
    cuda = settings.device.type == "cuda"
    first = _once_ms(call, cuda)
    least, most = CALLS
    if cuda and first < settings.rep_ms / least:
        return _on_device_ms(call, round(min(max(settings.rep_ms / first, least), HELD_CALLS)), held=not settings.host)
    calls = SLOW_CALLS if first > SLOW_MS else int(min(max(settings.rep_ms / first, least), most))
    return statistics.median(_once_ms(call, cuda) for _ in range(calls))


def _on_device_ms(call: Callable[[], object], calls: int, held: bool) -> float:
    """Median milliseconds on the device, its cache emptied before each call.

    held: the device is kept busy until the host has launched all of a call. Otherwise a call whose kernels are short takes the
    time that the host needs for it, which differs from run to run by a factor of two.
    """
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for begin, end in marks:
        cache.zero_()
        if held:
            torch.cuda._sleep(HELD_CYCLES)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def _once_ms(call: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- failures


def _word(error: BaseException) -> str:
    """Why a peer has no number, in one word."""
    text = str(error).lower()
    if isinstance(error, Unsaid):
        return "-"
    if isinstance(error, Late):
        return "late"
    if isinstance(error, OverflowError):
        return "int32"
    if isinstance(error, Unfused):
        return "unfused"
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in text:
        return "OOM"
    if "no available kernel" in text or "no viable backend" in text:
        return "no-kernel"
    return type(error).__name__.removesuffix("Error") or "failed"


def _held_to(implementation: str) -> contextlib.AbstractContextManager[None]:
    """Inside, the fused op runs one implementation, forward and backward; "" leaves it the choice."""
    if not implementation:
        return contextlib.nullcontext()
    from fusion_kernels.choice import force

    return force(implementation)


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raises `Late` in the main thread after `seconds`; a call into C++ is left to end first."""

    def ring(*_: object) -> None:
        raise Late(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of torch on why a kernel was not taken; graphs may be run backward more than once, for timing."""
    with warnings.catch_warnings(), torch._functorch.config.patch(donated_buffer=False):
        warnings.simplefilter("ignore")
        yield
