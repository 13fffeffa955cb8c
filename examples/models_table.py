"""What models.py shows: the table as text and as markdown, and what it comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from models_cases import MODELS
from models_steps import WAYS, Result

__all__ = ["Run", "agree", "markdown", "summary", "table"]

# One rounding of bf16 is 2**-8 of a value. A loss is a mean over thousands of rounded numbers, and the norm of all gradients a
# sum over millions, through a few dozen layers: a wrong mask or scale is far beyond these, the order of a sum far below.
LOSS_BOUND, GRADIENT_BOUND = 2.0**-8, 2.0**-5
SAME_SOURCE = (("ours", "compile"), ("ours+sdpa", "sdpa"))  # whose losses have to agree
PEERS = (("ours", "compile"), ("ours", "sdpa"), ("ours+sdpa", "compile"), ("ours+sdpa", "sdpa"))
NOISE = 0.02  # of a time: less of a difference is none

Results = Mapping[tuple[str, str], Result]


@dataclass(frozen=True)
class Run:
    """Under what the results of one table were measured."""

    machine: str
    torch: str
    triton: str
    transformers: str
    timm: str

    @property
    def title(self) -> str:
        versions = ("torch", "transformers", "triton", "timm")
        found = [f"{name} {getattr(self, name)}" for name in versions if getattr(self, name)]
        return ", ".join([f"fusion_pass, whole models: {self.machine}", "bf16 autocast", *found])


def _of(results: Results, model: str, way: str) -> Result:
    return results.get((model, way), Result(model, way, word="?"))


def _models(results: Results) -> list[str]:
    return [name for name in MODELS if any((name, way) in results for way in WAYS)]


# ---------------------------------------------------------------- the table

HEADER = ("model", *WAYS, "compile/ours", "sdpa/ours", "fused")
FIRST = ("model", *(f"loss, {way}" for way in WAYS), *(f"compiled, {way}" for way in WAYS))


def _measured(result: Result) -> str:
    if result.ms is None:
        return result.word
    return f"{result.ms:.1f} ms" + (f" {result.peak_bytes / 2**30:.1f} GiB" if result.peak_bytes else "")


def _ratios(results: Results, model: str, peer: str, way: str) -> tuple[float | None, float | None]:
    """The peer's time and memory over those of `way`: above one, the way is the better."""
    other, own = _of(results, model, peer), _of(results, model, way)
    over = lambda a, b: a / b if a and b else None
    return over(other.ms, own.ms), over(other.peak_bytes, own.peak_bytes)


def _times(results: Results, model: str, peer: str, way: str = "ours") -> str:
    return "  ".join(f"{ratio:.2f}" for ratio in _ratios(results, model, peer, way) if ratio is not None)


def _fused(result: Result) -> str:
    return "" if result.sites is None else f"{result.fused}/{result.sites}"


def _cells(results: Results, model: str) -> list[str]:
    cells = [model, *(_measured(_of(results, model, way)) for way in WAYS)]
    cells += [_times(results, model, "compile"), _times(results, model, "sdpa")]
    return [*cells, " ".join(filter(None, (_fused(_of(results, model, way)) for way in ("ours", "ours+sdpa"))))]


def _first_cells(results: Results, model: str) -> list[str]:
    found = [_of(results, model, way) for way in WAYS]
    losses = ["" if r.loss is None else f"{r.loss:.4f}" + ("" if not _disagrees(results, model, r.way) else "!") for r in found]
    return [model, *losses, *("" if r.compiling is None else f"{r.compiling:.0f} s" for r in found)]


def table(results: Results) -> str:
    """Fixed columns: time and memory of a step in each way, the peers' over ours (time, memory), sites fused of sites seen."""
    rows = [list(HEADER), *(_cells(results, model) for model in _models(results))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    justify = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    return "\n".join("  ".join(justify(i, text) for i, text in enumerate(row)).rstrip() for row in rows)


# ---------------------------------------------------------------- what it comes to


def _disagrees(results: Results, model: str, way: str) -> bool:
    """Whether the first step of ours differs from that of plain torch.compile of the same source; NaN does."""
    peer = dict(SAME_SOURCE).get(way)
    if peer is None:
        return False
    own, other = _of(results, model, way), _of(results, model, peer)
    pairs = ((own.loss, other.loss, LOSS_BOUND), (own.gradient, other.gradient, GRADIENT_BOUND))
    return any(a is not None and b is not None and not abs(a - b) <= bound * abs(b) for a, b, bound in pairs)


def agree(results: Results) -> bool:
    """Whether everything was timed, and ours gives the loss and the gradients of the same source without the pass."""
    timed = all(_of(results, model, way).word in ("", "-") for model in _models(results) for way in WAYS)
    return timed and not any(_disagrees(results, model, way) for model in _models(results) for way in WAYS)


def summary(results: Results) -> Iterator[str]:
    """A line for each pair of ways: where ours is slower or larger; then what is wrong, left unfused or missing."""
    for way, peer in PEERS:
        found = {model: _ratios(results, model, peer, way) for model in _models(results)}
        known = {model: ratios for model, ratios in found.items() if ratios[0] is not None}
        if not known:
            continue
        worse = [f"{m} slower ({time:.2f})" for m, (time, _) in known.items() if time is not None and time < 1 - NOISE]
        worse += [f"{m} larger ({size:.2f})" for m, (_, size) in known.items() if size is not None and size < 1 - NOISE / 2]
        yield f"{way} beside {peer} ({', '.join(known)}): {', '.join(worse) or 'nowhere slower or larger'}"
    for model in _models(results):
        for way, peer in SAME_SOURCE:
            own, other = _of(results, model, way), _of(results, model, peer)
            if _disagrees(results, model, way):
                seen = [f"{r.way}: loss {r.loss}, gradients {r.gradient}" for r in (own, other)]
                yield f"wrong: {model}: {'; '.join(seen)}"
    for model in _models(results):
        for way in WAYS:
            result = _of(results, model, way)
            yield from (f"{model}, {way}: not fused: {text}" for text in result.left)
            if result.word not in ("", "-"):
                yield f"{model}, {way}: {result.word}" + (f" ({result.why})" if result.why else "")


# ---------------------------------------------------------------- docs/models.md

TEXT = """\
# Whole models

{machine}, {versions}.

Whole training steps in bf16 autocast: gradients to none, forward, backward, no optimizer. Weights are random, fp32, from a
configuration; data is random; dropout is off. ms: the median of at least 10 steps by CUDA events, one step behind the other, with
nothing else at work on the GPU. GiB: `torch.cuda.max_memory_allocated` over those steps, weights and gradients included.

- `ours`: `torch.compile(backend=fusion_pass.flash_backend)` of the source with eager attention.
- `compile`: plain `torch.compile` of the same source.
- `sdpa`: plain `torch.compile` of the library's own version that calls `scaled_dot_product_attention`; `-`: it has none.
- `ours+sdpa`: our backend on that version.
- `compile/ours`, `sdpa/ours`: time, then memory, over those of ours: above one, ours is the better.
- `fused`: attention sites that run as one op, of those seen; in `ours`, then in `ours+sdpa`.

    python examples/models.py --budget 250

"""
FIRST_TEXT = """
The loss of the first step, the same weights and data in each way (`!`: further from the same source without the pass than
rounding explains, or its gradients are), and the seconds that this step took, compile and all, beside the other processes.

"""


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def _described(results: Results, model: str) -> str:
    text = f"- {model}: {MODELS[model].title}" + (f" ({MODELS[model].note})" if MODELS[model].note else "")
    kernels = _of(results, model, "ours").kernels
    return text + (f"; ours: {', '.join(kernels)}" if kernels else "")


def markdown(run: Run, results: Results) -> str:
    """All of docs/models.md."""
    names = ("torch", "transformers", "triton", "timm")
    versions = ", ".join(f"{name} {getattr(run, name)}" for name in names if getattr(run, name))
    models = _models(results)
    lines = [*_grid(HEADER, [_cells(results, model) for model in models]), ""]
    lines += [_described(results, model) for model in models]
    first = _grid(FIRST, [_first_cells(results, model) for model in models])
    end = ["", "```", *summary(results), "```", ""]
    return TEXT.format(machine=run.machine, versions=versions) + "\n".join(lines) + "\n" + FIRST_TEXT + "\n".join([*first, *end])
