"""Whole training steps of nine models: our backend beside plain torch.compile, of eager attention and of the library's SDPA.

    python examples/models.py --budget 250                    every model in every way, within that many seconds
    python examples/models.py --resume                        what is not measured yet in out/models.json
    python examples/models.py --models bert,t5 --ways ours    some of it
    python examples/models.py --merge 1.json 2.json           parts as one table, nothing is measured
    python examples/models.py --table                         out/models.json as markdown: docs/models.md
    python examples/models.py --one bert --way ours           one way of one model, in this process
    python examples/models.py --tiny                          small models on a CPU, to try the code

The ways: `compile` is plain torch.compile of the source with eager attention, `ours` that source under fusion_pass.flash_backend;
`sdpa` is plain torch.compile of the source that calls scaled_dot_product_attention, `ours+sdpa` that source under our backend.
Every way of every model is a process: all compile at once, on all GPUs, and when none compiles any more, one after another is
timed on each GPU, with nobody else at work on it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from models_cases import MODELS
from models_steps import WAYS, Result, exists, measure
from models_table import Run, agree, markdown, summary, table

POLL = 0.05  # seconds between two looks at the processes
TIMING = 2.5  # seconds that the timing of one way takes, for the plan
STUCK = 60.0  # seconds that it may take
LIBRARIES = ("torch", "triton", "transformers", "timm")
TRIED = ("", "-", "OOM")  # words of results that --resume does not ask for again

Task = tuple[str, str]  # (model, way)
Results = dict[Task, Result]


# ---------------------------------------------------------------- one process


class Child:
    """The process of one way of one model: it compiles, writes its result without a time, and waits to be told to go on."""

    def __init__(self, task: Task, command: Sequence[str], env: Mapping[str, str], gpu: str, folder: Path) -> None:
        self.task, self.gpu = task, gpu
        self.path, self.log = (folder / f"{'-'.join(task)}.{ending}" for ending in ("json", "log"))
        self.path.unlink(missing_ok=True)
        self.began = 0.0  # to be timed
        self.stopped = ("", "")  # the word and the reason, where it did not end by itself
        arguments = [*command, "--json", str(self.path)]
        with self.log.open("wb") as log:  # in a session of its own: it has processes of its own
            self.process = subprocess.Popen(
                arguments, bufsize=0, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**env}, start_new_session=True
            )
        assert self.process.stdin is not None
        self._stdin = self.process.stdin

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def compiled(self) -> bool:
        """Whether there is nothing to wait for before something is timed."""
        return self.path.exists() or self.ended

    def go(self) -> None:
        """Let it be timed; it ends by itself then."""
        self.began = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has ended meanwhile
            self._stdin.write(b"go\n")

    def stop(self, word: str = "", why: str = "") -> None:
        self.stopped = (word, why)
        if not self.ended:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._stdin.close()

    def result(self) -> Result:
        """What it wrote, and why there is no more, if there is not."""
        result = load_one(self.path) if self.path.exists() else Result(*self.task)
        if self.path.exists() and result.word != "compiled":
            return result
        result.word, result.why = self.stopped
        if not result.word:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            result.word, result.why = "error", f"ended with {self.process.poll()}: {said[-1] if said else 'no word'}"
        return result


def load_one(path: Path) -> Result:
    return Result(**json.loads(path.read_text(encoding="utf-8")))


def save_one(result: Result, path: Path) -> None:
    """At once: a reader sees the whole of it or nothing."""
    written = path.with_suffix(".part")
    written.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
    written.replace(path)


# ---------------------------------------------------------------- all of them


def wave(children: Sequence[Child], compiled_by: float, timed_by: float, keep: Callable[[Result], None]) -> None:
    """All compile at once; then one after another is timed on each GPU. Times are those of time.monotonic.

    `keep` gets each result as soon as it is there.
    """
    try:
        while not all(child.compiled for child in children) and time.monotonic() < compiled_by:
            time.sleep(POLL)
        for child in children:
            if not child.compiled:
                child.stop("late", "it had not compiled in time")
        queues = {gpu: [c for c in children if c.gpu == gpu] for gpu in dict.fromkeys(c.gpu for c in children)}
        while any(queues.values()):
            for queue in queues.values():
                if queue and _over(queue[0], timed_by):
                    keep(queue.pop(0).result())
            time.sleep(POLL)
    finally:
        for child in children:
            child.stop(*child.stopped)


def _over(child: Child, timed_by: float) -> bool:
    """Whether the next may follow; begins what has not begun."""
    if child.ended:
        return True
    now = time.monotonic()
    if not child.began and now < timed_by:
        child.go()
        return False
    if not child.began:
        child.stop("missing", "no time was left to time it")
    elif now > child.began + STUCK or now > timed_by + TIMING:
        child.stop("late", "its timing did not end")
    return child.ended


def waves(
    tasks: Sequence[Task],
    jobs: int,
    gpus: Sequence[str],
    seconds: tuple[float, float],
    spawn: Callable[[Task, str], Child],
    keep: Callable[[Result], None],
) -> None:
    """All tasks, at most `jobs` at a time, spread over the GPUs. seconds: for everything; for one task to compile."""
    stop = time.monotonic() + seconds[0]
    count = -(-len(tasks) // jobs)
    size = -(-len(tasks) // count) if count else 1
    for i in range(count):
        part = tasks[i * size : (i + 1) * size]
        now = time.monotonic()
        until = now + (stop - now) / (count - i)  # an equal share of what is left
        timing = TIMING * -(-len(part) // len(gpus))
        if until - timing <= now:
            for task in part:
                keep(Result(*task, word="missing", why="no time was left to compile it"))
            continue
        children = [spawn(task, gpus[j % len(gpus)]) for j, task in enumerate(part)]
        wave(children, min(until - timing, now + seconds[1]), until, keep)


def environment(gpu: str, threads: int) -> dict[str, str]:
    """Of a process that compiles beside others, on one GPU ("" for none)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FUSION_PASS")}
    env |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return {**env, "CUDA_VISIBLE_DEVICES": gpu} if gpu else env


def devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to be for each GPU; one empty name where there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())] or [""]


# ---------------------------------------------------------------- results, kept


def save(run: Run, results: Results, path: Path) -> None:
    """Times in milliseconds, memory in bytes, compile times in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {**dataclasses.asdict(run), "results": [dataclasses.asdict(result) for result in results.values()]}
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def load(path: Path) -> tuple[Run, Results]:
    """What `save` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found = [Result(**result) for result in data.pop("results")]
    return Run(**data), {(result.model, result.way): result for result in found}


def merge(paths: Sequence[Path]) -> tuple[Run, Results]:
    """All results, in the order of a whole run; of one that is there twice, what was timed, else the later.

    Raises:
        ValueError: the files differ in machine, versions or sizes: their times do not compare.
    """
    run, results = load(paths[0])
    for path in paths[1:]:
        other, found = load(path)
        if other != run:
            raise ValueError(f"{path} was measured under {other}, {paths[0]} under {run}; needed: parts of one table")
        results |= {task: result for task, result in found.items() if not result.word or task not in results}
    return run, {task: results[task] for task in tasks(MODELS, WAYS) if task in results}


def tasks(models: Sequence[str] | Mapping[str, object], ways: Sequence[str] | Mapping[str, object]) -> list[Task]:
    """One way of all models after another: a run that is cut short has what matters."""
    return [(model, way) for way in WAYS if way in ways for model in MODELS if model in models]


# ---------------------------------------------------------------- the command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {','.join(MODELS)}")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {','.join(WAYS)}")
    parser.add_argument("--jobs", type=int, default=cores + cores // 4, help="processes at a time (default 1.25 for each core)")
    parser.add_argument("--threads", type=int, default=2, help="of each process, that compile kernels (default 2)")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds, after which what is missing is missing")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that one way of one model may compile")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where JSON, markdown and logs go (default out/)")
    parser.add_argument("--json", type=Path, help="where the JSON goes (default models.json in --out)")
    parser.add_argument("--resume", action="store_true", help="measure only what --json has no time for")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="one table of measured parts; measures nothing")
    parser.add_argument("--table", action="store_true", help="print the markdown of --json, or of --merge; measures nothing")
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU, that nobody compiles: to try the code")
    parser.add_argument("--one", choices=tuple(MODELS), help="measure this model in this process, in one --way")
    parser.add_argument("--way", choices=tuple(WAYS), default="ours")
    parser.add_argument("--wait", action="store_true", help="with --one: write the JSON once compiled, go on at a line of input")
    given = parser.parse_args()
    given.json = given.json or given.out / "models.json"
    for name, allowed in (("models", MODELS), ("ways", WAYS)):
        chosen = getattr(given, name).split(",")
        unknown = [c for c in chosen if c not in allowed]
        if unknown:
            parser.error(f"--{name}: {unknown[0]!r} is not one of {', '.join(allowed)}")
        setattr(given, name, chosen)
    if not (given.tiny or given.merge or given.table or torch.cuda.is_available()):
        parser.error("there is no CUDA device here, and these models need one; --tiny tries the code without")
    return given


def one(given: argparse.Namespace) -> int:
    """Measure one way of one model, here."""

    def compiled(result: Result) -> bool:
        if given.wait:
            save_one(result, given.json)
        return not given.wait or bool(sys.stdin.readline())  # nothing comes of a parent that is gone

    result = measure(given.one, given.way, given.tiny, compiled)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    save_one(result, given.json)
    print(json.dumps(dataclasses.asdict(result), indent=1), flush=True)
    if given.wait:
        os._exit(0)  # the next one waits for the GPU: nothing is tidied up
    return result.word not in ("", "-")


def everything(given: argparse.Namespace) -> tuple[Run, Results]:
    """Measure what is asked for and not there yet; the JSON is written after each result."""
    run, started = _run(given.tiny), time.monotonic()
    results: Results = {}
    if given.resume and given.json.exists():
        before, results = load(given.json)
        if before != run:
            raise ValueError(f"{given.json} was measured under {before}, this is {run}; needed: another --json")
    todo = [task for task in tasks(given.models, given.ways) if task not in results or results[task].word not in TRIED]

    def keep(result: Result) -> None:
        results[result.model, result.way] = result
        save(run, results, given.json)
        print(f"{time.monotonic() - started:4.0f} s  {_progress(result)}", flush=True)

    folder = given.out / "models"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *(["--tiny"] if given.tiny else []), "--wait"]

    def spawn(task: Task, gpu: str) -> Child:
        env = environment(gpu, given.threads)
        return Child(task, [*command, "--one", task[0], "--way", task[1]], env, gpu, folder)

    results |= {task: Result(*task, word="-") for task in todo if not exists(*task)}
    save(run, results, given.json)
    todo = [task for task in todo if exists(*task)]
    waves(todo, given.jobs, [""] if given.tiny else devices(), (given.budget, given.limit), spawn, keep)
    return run, {task: results[task] for task in tasks(MODELS, WAYS) if task in results}


def _run(tiny: bool) -> Run:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = ""
    return Run("CPU, tiny" if tiny else torch.cuda.get_device_name(), **versions)


def _progress(result: Result) -> str:
    cells = [f"{result.model:<9} {result.way:<9}", f"{result.ms:.1f} ms" if result.ms else f"{result.word}: {result.why[:160]}"]
    cells += [f"{result.peak_bytes / 2**30:.1f} GiB"] if result.peak_bytes else []
    cells += [f"loss {result.loss:.4f}"] if result.loss is not None else []
    cells += [f"{result.fused} of {result.sites} fused"] if result.sites is not None else []
    return "  ".join([*cells, f"compiled in {result.compiling:.0f} s"] if result.compiling else cells)


def main() -> int:
    given = arguments()
    if given.one:
        return one(given)
    if given.merge:
        run, results = merge(given.merge)
        save(run, results, given.json)
    elif given.table:
        run, results = load(given.json)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the processes are stopped too
        run, results = everything(given)
    text = markdown(run, results)
    if given.table:
        print(text, end="")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "models.md").write_text(text, encoding="utf-8")
    print("\n".join(["", run.title, table(results), "", *summary(results)]))
    return not (results and agree(results))


if __name__ == "__main__":
    sys.exit(main())
