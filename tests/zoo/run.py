"""The zoo, run whole: ``python -m tests.zoo.run --resume out/zoo.json``; ``make zoo`` does that and writes the table.

Each architecture runs in a process of its own, forked from one that has imported everything, with a limit of time and of memory.
A result is a line of JSON in the file; a run with the same file goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

GIB = 2**30


def names() -> list[str]:
    """Every model type for which transformers has a model."""
    from transformers.models.auto import modeling_auto

    tables = [
        t for name, t in sorted(vars(modeling_auto).items()) if name.endswith("_MAPPING_NAMES") and name.startswith("MODEL_")
    ]
    return sorted({name for table in tables for name in table})


def isolated(name: str, run: str, inner: str, seconds: float, memory: float) -> dict[str, Any]:
    """`measure` in a forked process; what stops it (time, memory, a crash) is in the record."""
    receive, send = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(send, name, run, inner, memory)
    os.close(send)
    text = _read(receive, begin + seconds)
    if text is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    why = f"more than {seconds:.0f} s" if text is None else f"the process ended with status {os.waitstatus_to_exitcode(status)}"
    return {"name": name, "run": run, "state": "stopped", "error": why, "seconds": round(time.monotonic() - begin, 1)}


def _child(send: int, name: str, run: str, inner: str, memory: float) -> NoReturn:
    """Measure, write the record to the pipe, and end: nothing of the parent may run here."""
    from zoo.measure import measure

    try:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = int(memory * GIB) if hard == resource.RLIM_INFINITY else min(int(memory * GIB), hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
        text = json.dumps(measure(name, run, inner=inner))
        with os.fdopen(send, "w") as pipe:
            pipe.write(text)
    finally:
        os._exit(0)


def _read(pipe: int, until: float) -> str | None:
    """What is written to the pipe until it is closed; None if time runs out first."""
    data = b""
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            os.close(pipe)
            return None
        piece = os.read(pipe, 1 << 16)
        if not piece:
            os.close(pipe)
            return data.decode()
        data += piece


def load(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The last record of each architecture and run."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(r["name"], r["run"]): r for r in map(json.loads, lines)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.run", description="the zoo")
    parser.add_argument("--resume", type=Path, metavar="FILE", default=Path("out/zoo.json"), help="results, one line each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these model types, again even if the file has them")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the i-th of n parts")
    parser.add_argument("--runs", nargs="+", default=["eval", "padded", "train"], choices=["eval", "padded", "train"])
    parser.add_argument("--inner", default="eager", help="the Dynamo backend below the pass")
    parser.add_argument("--again", nargs="+", default=[], metavar="STATE", help="records in these states are measured again")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--memory", type=float, default=12, help="GiB of address space")
    a = parser.parse_args()
    part, parts = map(int, a.part.split("/"))

    import torch
    import torch._dynamo

    from zoo import measure

    torch.set_num_threads(1)
    measure.quiet()
    measure.measure("bert", "eval")  # what is imported and made on first use is so once, before the forks
    done = load(a.resume)
    a.resume.parent.mkdir(parents=True, exist_ok=True)
    todo = [(name, run) for run in a.runs for name in (a.only or names()[part - 1 :: parts])]
    for name, run in todo:
        before = done.get((name, run))
        if not a.only and before is not None and before["state"] not in a.again:
            continue
        first = done.get((name, "eval"))
        if not a.only and run != "eval" and first is not None and first["state"] in ("build", "eager"):
            continue  # what does not run in eager mode does not run otherwise
        record = isolated(name, run, a.inner, a.seconds, a.memory)
        done[name, run] = record
        with a.resume.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(_line(record), flush=True)
    return 0


def _line(r: dict[str, Any]) -> str:
    if r["state"] != "done":
        return f"{r['name']:<34} {r['run']:<7} {r['seconds']:>5} s  {r['state']}: {r.get('error')} ({r.get('at')})"
    refused = "; ".join(f"{n} x {reason} [{where}]" for reason, _, where, n in r["refused"])
    return (
        f"{r['name']:<34} {r['run']:<7} {r['seconds']:>5} s  {r['fused']} of {r['sites']} left {r.get('left', '-')} "
        f"{r['variant']}  {r['share']:.2f} {r['gradient_share']:.2f}  {refused}"
    )


if __name__ == "__main__":
    sys.exit(main())
