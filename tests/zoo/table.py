"""docs/zoo.md: what `tests.zoo.run` has measured, as one table with the totals at its head.

``python -m tests.zoo.table out/zoo.json docs/zoo.md`` writes it. Errors are rounded up to tenths, so that a table which is made
again shows what has changed and not which machine made it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter as Tally
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["read", "row", "table"]

Record = dict[str, Any]
RUNS = ("eval", "padded", "train")

HEAD = """\
# The zoo

Every architecture of transformers {version} that can be built from a configuration, made small (see `tests/zoo/shrink.py`),
with random weights and `attn_implementation="eager"`, compiled with `fusion_pass.make_backend(inner="eager", when="always")`
and held to eager mode in float64. `make zoo` makes this table; a line that changes is for review.

- **sites**: attentions that run, counted without the plugin: softmaxes between two products of matrices (`tests/zoo/sites.py`).
- **fused**: how many of them ran as one op; more than the sites where a call of the library's own SDPA is fused too.
- **error**: the largest error of an output, as a share of what the rule of `tests/checks.py` allows (twice the error of eager
  mode in the same dtype, and a rounding): 1.0 is the bound. Of inference, of training with padding, and of all its gradients.
- **refused**: what the plugin says, and the line of the softmax. What is refused and is no site (a router, a gate) is listed
  too. "Not seen" are sites that the plugin did not take for attention at all, or that torch.compile left out of its graphs.

{totals}
"""


def read(path: Path) -> dict[str, dict[str, Record]]:
    """Architecture -> run -> the last record of it."""
    found: dict[str, dict[str, Record]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record["name"], {})[record["run"]] = record
    return dict(sorted(found.items()))


def table(records: dict[str, dict[str, Record]], version: str) -> str:
    """The page."""
    ran = {name: runs for name, runs in records.items() if any(r["state"] == "done" for r in runs.values())}
    with_sites = {name: runs for name, runs in ran.items() if _sites(runs)}
    parts = [HEAD.format(version=version, totals=_totals(records, ran, with_sites))]
    parts += [
        "## Architectures with attention\n",
        "| architecture | sites | fused | error | refused and notes |",
        "|---|---|---|---|---|",
    ]
    parts += [row(name, runs) for name, runs in with_sites.items()]
    parts += [
        "\n## Architectures that run and have no softmax between two products\n",
        ", ".join(n for n in ran if n not in with_sites),
    ]
    parts += ["\n## Architectures that cannot be built or run here, and why\n", "| architecture | what | |", "|---|---|---|"]
    parts += [_failed(name, runs) for name, runs in records.items() if name not in ran]
    return "\n".join(parts) + "\n"


def row(name: str, runs: dict[str, Record]) -> str:
    """One architecture, one line."""
    done = [r for r in runs.values() if r["state"] == "done"]
    sites, fused = _sites(runs), min(r["fused"] for r in done if r["run"] != "train" or len(done) == 1)
    errors = [_error(runs.get("eval"), "share"), _error(runs.get("train"), "share"), _error(runs.get("train"), "gradient_share")]
    return f"| {name} | {sites} | {fused} | {' '.join(errors)} | {_notes(runs)} |"


def _sites(runs: dict[str, Record]) -> int:
    return max((r["sites"] for r in runs.values() if r["state"] == "done"), default=0)


def _error(record: Record | None, name: str) -> str:
    if record is None or record["state"] != "done" or not record["fused"]:
        return "-"
    return f"{math.ceil(10 * record[name]) / 10:.1f}" if math.isfinite(record[name]) else "inf"


def _notes(runs: dict[str, Record]) -> str:
    notes: dict[str, None] = {}
    for record in runs.values():
        if record["state"] != "done":
            notes[f"{record['run']}: {_short(record)}"] = None
            continue
        for reason, _, where, count in record["refused"]:
            notes[f"{count} x {reason} ({where}{'' if where in record['lines'] else ', no site'})"] = None
        missing = unmentioned(record)
        if missing:
            lines = ", ".join(record["lines"])
            notes[f"{missing} not seen by the plugin ({lines})"] = None
        if record.get("variant"):
            notes[record["variant"]] = None
        if record.get("sdpa"):
            notes[f"calls SDPA itself: {', '.join(record['sdpa'])}"] = None
        if not record["finite"]:
            notes["eager mode gives NaN or inf"] = None
        if record["basis"] != "float64":
            notes["held to eager mode in float32: it has no float64"] = None
    return "; ".join(notes).replace("|", "\\|")


def unmentioned(record: Record) -> int:
    """Sites that were neither fused nor refused: the plugin did not know them for attention, or no graph held them."""
    return max(0, record["sites"] - record["fused"] - sum(n for *_, where, n in record["refused"] if where in record["lines"]))


def _totals(records: Iterable[str], ran: dict[str, Any], with_sites: dict[str, dict[str, Record]]) -> str:
    lines = [f"{len(ran)} of {len(list(records))} architectures run; {len(with_sites)} of them have attention."]
    for run, what in (("eval", "Inference"), ("padded", "Inference, padded"), ("train", "Training, padded")):
        done = [runs[run] for runs in with_sites.values() if run in runs and runs[run]["state"] == "done"]
        if not done:
            continue
        sites, fused = sum(r["sites"] for r in done), sum(min(r["fused"], r["sites"]) for r in done)
        over = [r["name"] for r in done if max(r["share"], r["gradient_share"]) > 1]
        lines += [
            f"- {what}: {fused} of {sites} sites fused ({100 * fused / max(sites, 1):.1f}%) in {len(done)} architectures; "
            f"{len(over)} beyond the rule of errors{': ' + ', '.join(over) if over else ''}."
        ]
    reasons: Tally[str] = Tally()
    for runs in with_sites.values():
        record = runs.get("eval", {"state": ""})
        if record["state"] == "done":
            for reason, _, where, n in record["refused"]:
                reasons[reason] += n if where in record["lines"] else 0
            reasons["not seen by the plugin"] += unmentioned(record)
    lines += ["", "| sites not fused in inference | reason |", "|---|---|"]
    return "\n".join(lines + [f"| {n} | {reason} |" for reason, n in reasons.most_common() if n])


def _failed(name: str, runs: dict[str, Record]) -> str:
    record = next(iter(runs.values()))
    return f"| {name} | {record['state']} | {_short(record)} |"


def _short(record: Record) -> str:
    text = re.sub(r"(/[\w.\-]+)+/", "", str(record.get("error", "")))
    return f"{text[:160]} ({record['at']})".replace("|", "\\|") if record.get("at") else text[:160].replace("|", "\\|")


def main() -> None:
    import transformers

    source, target = map(Path, sys.argv[1:3])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(table(read(source), transformers.__version__), encoding="utf-8")


if __name__ == "__main__":
    main()
