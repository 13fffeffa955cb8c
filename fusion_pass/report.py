"""What was fused, what was not, and why: the sites of all graphs of one compile, as text.

A compile may give several graphs (graph breaks, nested calls): a graph that is compiled while code that Dynamo made
is running belongs to the call that runs it, and to its report; any other graph starts a new one.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

from . import config

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .site import AttentionSite, Operand, Site, Verdict

__all__ = ["GraphEntry", "Report", "collect", "graph", "last_report"]


@dataclass
class GraphEntry:
    """One compiled graph and its sites, in the order of the graph."""

    index: int
    sites: tuple[Site, ...] = ()


@dataclass
class Report:
    """The sites of every graph of one compile. ``str(report)`` is the text; `show` prints it."""

    graphs: list[GraphEntry] = field(default_factory=list)
    names: set[str] = field(default_factory=set, repr=False)  # what Dynamo calls the parts of this compile

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every softmax that was looked at, fused or not, in order; one for each product of its probabilities with values."""
        return tuple(site for entry in self.graphs for site in entry.sites)

    @property
    def fused(self) -> tuple[Site, ...]:
        """The sites that run as one op."""
        return tuple(site for site in self.sites if site.verdict.fused)

    @property
    def refused(self) -> tuple[Site, ...]:
        """The sites that were left as they were; ``site.verdict`` has the reason."""
        return tuple(site for site in self.sites if not site.verdict.fused)

    def show(self, file: IO[str] | None = None) -> None:
        """Print the report to `file` (default: standard output), in colour where that is a terminal."""
        _show(self._headline(), self.sites, sys.stdout if file is None else file)

    def __str__(self) -> str:
        return "\n".join([self._headline(), *_blocks(self.sites)])

    def __rich__(self) -> RenderableType:
        return _styled(self._headline(), self.sites)

    def _headline(self) -> str:
        if not self.graphs:
            return "fusion_pass: no graph was compiled"
        graphs = f"{len(self.graphs)} graphs" if len(self.graphs) > 1 else "1 graph"
        return f"fusion_pass: {_count(self.sites)}, {graphs}"


_current = Report()
_collecting = False  # every graph goes to the current report, whatever starts it


def last_report() -> Report:
    """The report of the last compile, whichever way the pass was switched on; an empty one before the first."""
    return _current


@contextlib.contextmanager
def collect() -> Iterator[Report]:
    """One report for every graph that is compiled inside, also where the model's own frame is not compiled."""
    global _current, _collecting
    _current, _collecting = Report(), True
    try:
        yield _current
    finally:
        _collecting = False


@contextlib.contextmanager
def graph() -> Iterator[GraphEntry]:
    """Open the entry of a graph that is about to be compiled; the caller fills in its sites.

    With FUSION_PASS_REPORT=1 the entry is printed to stderr when it is complete.
    """
    global _current
    report = _current
    if not _collecting and not _continued(_current):
        report = Report(names=_dynamo_names())
    entry = GraphEntry(len(report.graphs))
    yield entry
    report.graphs.append(entry)
    _current = report
    if config.report():
        _show(f"fusion_pass: graph {entry.index}: {_count(entry.sites)}", entry.sites, sys.stderr)


def _dynamo_names() -> set[str]:
    """What the code that Dynamo made, and that is running up the stack, calls."""
    names: set[str] = set()
    frame = sys._getframe(1)
    while frame is not None:
        names.update(name for name in frame.f_code.co_names if name.startswith(("__compiled_fn_", "__resume_at_")))
        frame = frame.f_back
    return names


def _continued(report: Report) -> bool:
    """Whether the graph at hand is a further one of the call that `report` is about.

    Code that Dynamo made runs up the stack then. It is known by the names that it calls: those seen before, or, after the
    first graph, whose own name nobody has seen yet, those of code that ran a graph of its own.
    """
    names = _dynamo_names()
    ran = any(name.startswith("__compiled_fn_") for name in names)
    if names and (names & report.names or (ran and report.graphs and not report.names)):
        report.names |= names
        return True
    return False


def _count(sites: tuple[Site, ...]) -> str:
    if not sites:
        return "no softmax found"
    return f"{sum(site.verdict.fused for site in sites)} of {len(sites)} attention sites fused"


# ---------------------------------------------------------------- text


def _blocks(sites: tuple[Site, ...]) -> list[str]:
    return [line for first, count in _alike(sites) for line in ("", _title(first, count), *_lines(first, count))]


def _alike(sites: tuple[Site, ...]) -> list[tuple[Site, int]]:
    """Sites that read the same (the layers of a model), once, with their number; the counters in names may differ."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        lines = tuple(re.sub(r"_\d+", "_", line) for line in _lines(site, 1))
        groups.setdefault((site.graph, site.source, *lines), []).append(site)
    return [(group[0], len(group)) for group in groups.values()]


def _title(site: Site, count: int) -> str:
    verdict = "fused" if site.verdict.fused else "refused"
    return f"{verdict}{f' x {count}' if count > 1 else ''}  {_place(site.source) or site.softmax or 'the whole graph'}"


def _place(source: str) -> str:
    """The path as its reader knows it: below the installed packages, or below the working directory."""
    installed = re.split(r"(?:site|dist)-packages/", source)[-1]
    return installed.removeprefix(f"{os.getcwd()}{os.sep}")


def _lines(site: Site, count: int) -> list[str]:
    verdict, attention = site.verdict, site.attention
    rows = [("code", site.code.strip())]
    if attention is not None:
        rows += [("shapes", _shapes(attention)), ("formula", attention.formula), ("mask", attention.mask.text)]
        rows += [("dropout", f"p = {attention.dropout_p:g}, in the kernel")] if attention.dropout_p else []
    if verdict.fused:
        rows += [("kernel", _kernels(verdict))]
        rows += [("saved", _saved(attention.bytes_saved, count))] if attention and attention.bytes_saved else []
    else:
        rows += [("why", verdict.reason.value if verdict.reason else ""), ("seen", verdict.seen), ("needed", verdict.needed)]
    return [f"  {name:<8} {text}" for name, text in rows if text]


def _kernels(verdict: Verdict) -> str:
    """One name where forward and backward are run by the same kernel, or there is no backward."""
    same = verdict.backward in ("", verdict.kernel)
    return verdict.kernel if same else f"{verdict.kernel}, backward {verdict.backward}"


def _shapes(attention: AttentionSite) -> str:
    return "  ".join(f"{name} {_operand(operand)}" for name, operand in zip("qkv", (attention.q, attention.k, attention.v)))


def _operand(operand: Operand) -> str:
    return f"[{', '.join(map(str, operand.shape))}] {str(operand.dtype).removeprefix('torch.')}"


def _saved(size: int, count: int) -> str:
    each = " each" if count > 1 else ""
    return f"{_bytes(size)} of scores and probabilities a forward no longer stored{each}"


def _bytes(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


# ---------------------------------------------------------------- terminal


def _show(headline: str, sites: tuple[Site, ...], file: IO[str]) -> None:
    if not getattr(file, "isatty", lambda: False)():
        file.write("\n".join([headline, *_blocks(sites)]) + "\n")
        return
    from rich.console import Console

    Console(file=file, highlight=False).print(_styled(headline, sites))


def _styled(headline: str, sites: tuple[Site, ...]) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    parts = [Text(headline, style="bold")]
    for site, count in _alike(sites):
        parts += [Text(), Text(_title(site, count), style="bold green" if site.verdict.fused else "bold yellow")]
        for line in _lines(site, count):
            text = Text(line, overflow="fold")
            text.stylize("dim", 0, 11)
            parts.append(text)
    return Group(*parts)
