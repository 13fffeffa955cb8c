"""What benchmark.py shows: the table as text and as markdown, the summary, the plot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmark_cases import WINDOW
from benchmark_measure import Problem, Result

__all__ = ["Row", "markdown", "plot", "summary", "table"]

ERROR_FACTOR = 2.0  # ours may be this much further from float64 than eager is
ERROR_EPSILON = (
    1e-7  # one rounding of fp32, the accumulator of every dtype here: where eager happens to be exact, nobody else must
)


@dataclass
class Row:
    """One problem and the result of each peer; eager_errors: relative to float64, of out and of each gradient."""

    problem: Problem
    results: dict[str, Result] = field(default_factory=dict)
    eager_errors: list[float] = field(default_factory=list)

    def ratios(self, peer: str) -> tuple[float | None, float | None]:
        """The peer's time over ours, forward and backward: above one, ours is the faster."""
        ours, other = self.results.get("ours", Result()), self.results.get(peer, Result())
        return _over(other.forward_ms, ours.forward_ms), _over(other.backward_ms, ours.backward_ms)

    def error_ratio(self, peer: str) -> float | None:
        """The largest of the peer's errors over eager's own; NaN counts as infinite."""
        found = self.results.get(peer, Result()).errors
        ratios = [e / max(own, 1e-300) for e, own in zip(found, self.eager_errors, strict=False)]
        return max((float("inf") if math.isnan(r) else r for r in ratios), default=None)

    def right(self, peer: str) -> bool:
        """Whether the peer ran and no error of its is above `ERROR_FACTOR` times eager's (NaN is)."""
        result = self.results.get(peer, Result())
        pairs = zip(result.errors, self.eager_errors, strict=False)
        return not result.word and all(e <= ERROR_FACTOR * own + ERROR_EPSILON for e, own in pairs)


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


# ---------------------------------------------------------------- the table


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    p, ours = row.problem, row.results.get("ours", Result())
    cells = [f"{p.case}, training" if p.trains else p.case, str(p.b), str(p.h), str(p.n), str(p.d)]
    cells += [ours.word or _number(ours.forward_ms), "" if ours.word else _number(ours.backward_ms)]
    for peer in peers:
        result = row.results.get(peer, Result(word="" if p.trains else "?"))
        forward, backward = row.ratios(peer)
        if result.word or forward is None:
            cells.append(result.word)
        else:
            cells.append(f"{_number(forward)}/{_number(backward) if backward is not None else '-'}")
    cells += [_mib(ours), _mib(row.results.get("eager", Result()))]
    for peer in ("ours", "flex"):
        ratio = row.error_ratio(peer)
        cells.append("" if ratio is None else f"{ratio:.1f}" + ("" if row.right(peer) else "!"))
    return cells


def _header(peers: Sequence[str]) -> list[str]:
    return ["case", "B", "H", "N", "D", "fwd", "bwd", *peers, "MiB", "eager's", "err", "flex's"]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _mib(result: Result) -> str:
    return result.word if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"


def table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    """Fixed columns: milliseconds of ours, then peer / ours as forward/backward, peak MiB of a step, errors over eager's."""
    lines = [_header(peers), *(_cells(row, peers) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    justify = lambda i, text: text.ljust(widths[i]) if i == 0 else text.rjust(widths[i])
    return "\n".join(" ".join(justify(i, text) for i, text in enumerate(line)).rstrip() for line in lines)


def markdown(rows: Sequence[Row], peers: Sequence[str], title: str) -> str:
    """The same as a markdown table, under `title` and followed by the summary."""
    header = _header(peers)
    lines = [f"# {title}", "", "Times are milliseconds of ours; a peer's cell is its time over ours, forward/backward.", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(_cells(row, peers)) + " |" for row in rows]
    return "\n".join([*lines, "", "```", *summary(rows, peers), "```", ""])


# ---------------------------------------------------------------- the summary


def summary(rows: Sequence[Row], peers: Sequence[str]) -> Iterator[str]:
    """A line a peer (geometric mean and worst ratio), what masks save, and what is wrong."""
    for peer in peers:
        parts = []
        for name, which in (("forward", 0), ("backward", 1)):
            found = [(ratio, row.problem) for row in rows if (ratio := row.ratios(peer)[which]) is not None]
            if found:
                worst, at = min(found, key=lambda pair: pair[0])
                mean = math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found))
                parts.append(f"{name} {_number(mean)} (worst {_number(worst)}: {at.case} N={at.n} D={at.d})")
        if parts:
            yield f"{peer:<9} over ours, geometric mean: " + ", ".join(parts)
    yield from _saved_by_masks(rows)
    kernels = Counter(ours.kernel for row in rows if (ours := row.results.get("ours")) and ours.kernel)
    if kernels:
        yield "ours ran " + ", ".join(f"{kernel} in {count} rows" for kernel, count in kernels.most_common())
    wrong = [
        f"{r.problem.case} N={r.problem.n} D={r.problem.d} ({r.results['ours'].word or 'inexact'})"
        for r in rows
        if not r.right("ours")
    ]
    yield f"wrong or missing: {', '.join(wrong)}" if wrong else "ours is fused and right (error at most 2x eager's) in every row"


def _saved_by_masks(rows: Sequence[Row]) -> Iterator[str]:
    whole = {_shape(r.problem): r.results["ours"] for r in rows if r.problem.case == "full" and "ours" in r.results}
    for row in rows:
        p, base = row.problem, whole.get(_shape(row.problem))
        if p.case not in ("causal", "window") or p.trains or base is None or "ours" not in row.results:
            continue
        width = min(WINDOW, p.n)
        share = (p.n + 1) / (2 * p.n) if p.case == "causal" else (width * p.n - width * (width - 1) / 2) / p.n**2
        ours = row.results["ours"]
        times = [_over(ours.forward_ms, base.forward_ms), _over(ours.backward_ms, base.backward_ms)]
        if all(t is not None for t in times):
            forward, backward = (f"{t:.2f}" for t in times)
            yield f"{p.case} N={p.n} D={p.d}: {forward} forward, {backward} backward of full's time, {share:.2f} of its pairs"


def _shape(p: Problem) -> tuple[int, int, int, int, bool]:
    return p.b, p.h, p.n, p.d, p.trains


# ---------------------------------------------------------------- the plot


def plot(rows: Sequence[Row], peers: Sequence[str], path: Path, title: str) -> None:
    """A dot for each peer and problem on a logarithmic axis of peer / ours; right of the line, ours is the faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if not row.problem.trains]
    labels = [f"{r.problem.case}  N {r.problem.n}  D {r.problem.d}" for r in shown]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.8 + 0.2 * len(shown)), sharey=True)
    for which, (axis, name) in enumerate(zip(axes, ("forward", "backward"), strict=True)):
        for peer in peers:
            found = [(ratio, i) for i, row in enumerate(shown) if (ratio := row.ratios(peer)[which]) is not None]
            if found:
                axis.scatter(*zip(*found, strict=True), label=peer, s=18)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="time of the peer / time of ours", title=name)
        axis.set_yticks(range(len(shown)), labels, fontsize=7)
        axis.grid(axis="x", which="both", alpha=0.25)
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=max(len(names), 1), frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.6 / (1.8 + 0.2 * len(shown)), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
