"""The long fuzz: seeded, in parts, resumable. `python -m tests.fuzz.long --examples 3000 --seed 0 --resume out/fuzz.json`.

Part i of a seed holds the same programs wherever it runs (for one version of Hypothesis and of the strategy). A failing program
does not stop the run: it is kept in the file with its message, and the run goes on. The exit status is 1 if any has failed.
`--part i` runs one part alone and lets Hypothesis shrink its first failure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("FUSION_PASS_STRICT", "1")

import torch

from fuzz.drive import each
from fuzz.judge import check
from fuzz.programs import Written, programs

PART = 25  # examples: some ten seconds


def run_part(base: int, part: int, examples: int, *, shrink: bool) -> list[dict[str, Any]]:
    """The failures of one part: the program and the message of each."""
    failures: list[dict[str, Any]] = []

    def examine(program: Written) -> None:
        try:
            check(program)
        except Exception as e:
            if shrink:
                raise
            frames = traceback.format_exception_only(e)
            failures.append({"part": part, "message": "".join(frames)[-1500:], "script": program.script})
        finally:
            torch._dynamo.reset()

    each(programs(), examine, seed=base * 1_000_003 + part, count=examples, shrink=shrink)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.long", description="the long fuzz")
    parser.add_argument("--examples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="state; a run with the same FILE goes on where the last one stopped"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the part in which this time runs out")
    parser.add_argument("--part", type=int, help="run this part alone and shrink its first failure")
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or min(2, os.cpu_count() or 1))
    if a.part is not None:
        run_part(a.seed, a.part, PART, shrink=True)
        return 0

    state: dict[str, Any] = {"seed": a.seed, "parts": 0, "examples": 0, "seconds": 0.0, "failures": []}
    if a.resume and a.resume.exists():
        state = json.loads(a.resume.read_text())
        if state["seed"] != a.seed:
            parser.error(f"{a.resume} holds a run with seed {state['seed']}, not {a.seed}: pass that seed, or another file")
    begin = time.monotonic()
    while state["examples"] < a.examples and time.monotonic() - begin < 60 * a.minutes:
        start, count = time.monotonic(), min(PART, a.examples - state["examples"])
        state["failures"] += run_part(a.seed, state["parts"], count, shrink=False)
        state["parts"] += 1
        state["examples"] += count
        state["seconds"] += time.monotonic() - start
        if a.resume:
            a.resume.parent.mkdir(parents=True, exist_ok=True)
            a.resume.write_text(json.dumps(state, indent=1))
        if sys.stderr.isatty():
            print(
                f"\r{state['examples']}/{a.examples} programs, {len(state['failures'])} failed, {state['seconds']:.0f} s",
                end="",
                file=sys.stderr,
            )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for x in state["failures"]:
        print(f"--- part {x['part']}\n{x['message']}\n{x['script']}")
    print(f"seed {a.seed}: {state['examples']} programs, {len(state['failures'])} failed, {state['seconds']:.0f} s")
    return 1 if state["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
