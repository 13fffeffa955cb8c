"""What benchmark.py measured, as JSON: written after every row, read again to make one table of several parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmark_cases import CASES
from benchmark_measure import Problem, Result
from benchmark_table import Row

__all__ = ["Run", "load", "merge", "save"]


@dataclass(frozen=True)
class Run:
    """Under what the rows of one table were measured. ours: what the fused op was held to, "" for its own choice."""

    machine: str
    dtype: str
    torch: str
    triton: str
    ours: str = ""

    @property
    def title(self) -> str:
        versions = f"torch {self.torch}" + (f", Triton {self.triton}" if self.triton else "")
        held = f", ours held to {self.ours}" if self.ours else ""
        return f"fusion_pass benchmark: {self.machine}, {self.dtype}, {versions}{held}"


def save(run: Run, rows: Sequence[Row], path: Path) -> None:
    """Times in milliseconds, memory in bytes, errors relative to float64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**asdict(run), "rows": [_record(row) for row in rows]}, indent=1)
    path.write_text(text, encoding="utf-8")


def load(path: Path) -> tuple[Run, list[Row]]:
    """What `save` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Run(**{f.name: data[f.name] for f in fields(Run)}), [_restore(row) for row in data["rows"]]


def merge(paths: Sequence[Path]) -> tuple[Run, list[Row]]:
    """The rows of all files in the order of a whole run; of a problem that is there twice, the later.

    Raises:
        ValueError: the files differ in machine, dtype, versions or what ours was held to: their times do not compare.
    """
    parts = [(path, *load(path)) for path in paths]
    first, run, _ = parts[0]
    rows: dict[Problem, Row] = {}
    for path, other, found in parts:
        if other != run:
            raise ValueError(f"{path} was measured under {other}, {first} under {run}; needed: parts of one table")
        rows |= {row.problem: row for row in found}
    cases = list(CASES)
    return run, sorted(rows.values(), key=lambda row: _place(row.problem, cases))


def _place(p: Problem, cases: Sequence[str]) -> tuple[bool, int, int, int]:
    return not p.trains, p.d, p.n, cases.index(p.case)


def _record(row: Row) -> dict[str, Any]:
    peers = {name: asdict(result) for name, result in row.results.items()}
    return {**asdict(row.problem), "eager_errors": row.eager_errors, "peers": peers}


def _restore(data: Mapping[str, Any]) -> Row:
    problem = Problem(**{f.name: data[f.name] for f in fields(Problem)})
    return Row(problem, {name: Result(**result) for name, result in data["peers"].items()}, data["eager_errors"])
