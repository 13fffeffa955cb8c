"""Attention in plain PyTorch, eager, compiled and fused, beside SDPA and FlexAttention: one table, all ratios of one run.

    python examples/benchmark.py --quick                     a few minutes on a GPU
    python examples/benchmark.py                             every case, N = 512 ... 16384, D = 64 and 128: a quarter of an hour
    python examples/benchmark.py --part 1/3 --json 1.json    a third of those rows; and so on, at any time
    python examples/benchmark.py --merge 1.json 2.json 3.json    the parts as one table, nothing is measured
    python examples/benchmark.py --cases causal,bias --sizes 1024,4096 --dims 64
    python examples/benchmark.py --ours triton               the portable kernels alone, where the op would choose others
    python examples/benchmark.py --compile-time              what the pass adds to compiling a 12-layer GPT-2
    python examples/benchmark.py --device cpu --cases full   anywhere, at small sizes

`ours` is the plain source under torch.compile(backend=fusion_pass.make_backend(when="always")), and the run fails if the pass did
not fuse it, or if it is more than twice as far from float64 as eager. Columns: `fwd` and `bwd` are milliseconds of ours; a
peer's cell is its time over ours, forward/backward, or why there is none. Every time is a median; on a GPU it is what the kernels
take (--host: what the host takes to launch them, where that is longer). `MiB` is the peak memory of a training step beyond its
inputs, `eager's` is eager's; `err` and `flex's` are the largest error (of out and all gradients, against float64 on one head)
over eager's own. The time of making masks is in eager, compile and ours, not in SDPA and flex.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark_cases import CASES
from benchmark_compile import compile_time
from benchmark_measure import COMPILED, PEERS, SLOW_MS, Problem, Result, Settings, exact, measure
from benchmark_record import Run, merge, save
from benchmark_table import Row, markdown, plot, summary, table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = 16384  # of one problem, as far as one sequence allows
QUICK_SECONDS = 230.0
WORKERS = 10
SHOWN = ("flex", "eager", "compile", "flash", "cudnn", "efficient")
HELD_TO = ("triton", "cudnn", "aten", "tiled", "dense")


# ---------------------------------------------------------------- what is run


def problems(cases: Sequence[str], sizes: Sequence[int], dims: Sequence[int], cuda: bool) -> list[Problem]:
    """Every case at every size; on a GPU 16 heads and the same number of tokens at each size."""
    b, h = (None, 16) if cuda else (1, 4)
    return [Problem(case, b or max(TOKENS // n, 1), h, n, d) for d in dims for n in sizes for case in cases]


def training(sizes: Sequence[int] = (16384, 32768)) -> list[Problem]:
    """One training step of long sequences, ours beside eager."""
    return [Problem("causal", 1, 16, n, 128, trains=True) for n in sizes]


def quick(cases: Sequence[str]) -> list[Problem]:
    """The rows of --quick, the ones that say most first: what does not fit into the time is left out."""
    long = [Problem(case, 1, 16, 16384, d) for d in (128, 64) for case in ("full", "causal") if case in cases]
    some = [Problem(case, 4, 16, n, d) for n, d in ((4096, 128), (4096, 64), (1024, 64)) for case in cases]
    return [*training(), *long, *some]


@dataclass
class Known:
    """What earlier rows have shown: peers that were too slow or too large are not asked for as much work again."""

    limits: dict[tuple[str, int, str], tuple[int, str]]

    def word(self, problem: Problem, peer: str) -> str:
        work, word = self.limits.get((problem.case, problem.d, peer), (problem.work + 1, ""))
        return word if problem.work >= work else ""

    def learn(self, problem: Problem, peer: str, result: Result) -> None:
        slow = max(result.forward_ms or 0, result.backward_ms or 0) > SLOW_MS
        word = result.word if result.word in ("OOM", "late") else "slow" if slow else ""
        if word and not problem.trains:
            key = (problem.case, problem.d, peer)
            self.limits[key] = min((problem.work, word), self.limits.get(key, (problem.work, word)))


def measured(
    todo: Sequence[Problem],
    peers: Sequence[str],
    settings: Settings,
    seconds: float,
    late: set[tuple[Problem, str]],
    keep: Callable[[list[Row]], None],
) -> list[Row]:
    """Measures row by row; `keep` gets the rows after each, so that what was measured is never lost."""
    rows: list[Row] = []
    known, started = Known({}), time.monotonic()
    for problem in todo:
        if time.monotonic() - started > seconds:
            print(f"out of time: {len(todo) - len(rows)} of {len(todo)} rows are left out", flush=True)
            break
        case = CASES[problem.case]
        row = Row(problem)
        rows.append(row)
        try:
            x = case.inputs(problem.b, problem.h, problem.n, problem.d, settings.dtype, settings.device)
            errors = exact(case, x)
        except torch.cuda.OutOfMemoryError:
            row.results["ours"] = Result(word="OOM", why="the inputs, or their reference in float64, do not fit")
            continue
        row.eager_errors = errors.eager
        for peer in peers:
            if problem.trains and peer not in ("ours", "eager"):
                continue
            word = "late" if (problem, peer) in late else known.word(problem, peer)
            row.results[peer] = Result(word=word) if word else measure(peer, problem, x, settings, errors)
            known.learn(problem, peer, row.results[peer])
        del x, errors
        print(_progress(row, time.monotonic() - started), flush=True)
        keep(rows)
    return rows


def _progress(row: Row, seconds: float) -> str:
    p, ours = row.problem, row.results.get("ours")
    text = f"{seconds:4.0f} s  {p.case} N={p.n} D={p.d}"
    if ours and ours.errors:
        text += (
            "  errors "
            + " ".join(f"{e:.1e}" for e in ours.errors)
            + "  eager's "
            + " ".join(f"{e:.1e}" for e in row.eager_errors)
        )
    return text if not ours or not ours.word else f"{text}  {ours.word}: {ours.why.splitlines()[0][:160] if ours.why else ''}"


# ---------------------------------------------------------------- compiling ahead, in parallel


def _warm(job: tuple[Problem, str, Settings, str]) -> str:
    """In a child process: one step of one peer, which leaves its kernels in the caches on disk."""
    problem, peer, settings, mark = job
    Path(mark).touch()
    if settings.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.9 / WORKERS)
    x = CASES[problem.case].inputs(problem.b, problem.h, problem.n, problem.d, settings.dtype, settings.device)
    return measure(peer, problem, x, settings, None, only_compile=True).word


def warm(todo: Sequence[Problem], peers: Sequence[str], settings: Settings, seconds: float) -> set[tuple[Problem, str]]:
    """Compile for all rows in `WORKERS` processes; returns what did not end in time. Failures show again when measured."""
    with tempfile.TemporaryDirectory() as folder:
        marks = [(p, peer) for p in todo for peer in peers if peer in COMPILED and (not p.trains or peer == "ours")]
        jobs = [(p, peer, settings, f"{folder}/{i}") for i, (p, peer) in enumerate(marks)]
        before = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read by the children: they are parallel already
        started = time.monotonic()
        try:
            with multiprocessing.get_context("spawn").Pool(min(WORKERS, os.cpu_count() or 1)) as pool:
                waiting = [pool.apply_async(_warm, (job,)) for job in jobs]
                while time.monotonic() - started < seconds and not all(w.ready() for w in waiting):
                    time.sleep(0.2)
                words = [w.get() if w.ready() and w.successful() else "" for w in waiting]
                hung = [not w.ready() and Path(job[3]).exists() for w, job in zip(waiting, jobs, strict=True)]
        finally:
            os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS")
            if before is not None:
                os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = before
    late = {mark for mark, word, hangs in zip(marks, words, hung, strict=True) if word == "late" or hangs}
    print(f"compiled {len(jobs) - sum(hung)} of {len(jobs)} ahead in {time.monotonic() - started:.0f} s", flush=True)
    return late


# ---------------------------------------------------------------- the command


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part: I/N with 1 <= I <= N, as in 2/3")
    return int(part), int(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rows that say most, within about four minutes on a GPU")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--sizes", help="sequence lengths (default 512 ... 16384, on a CPU 256,1024)")
    parser.add_argument("--dims", help="head dims (default 64,128, on a CPU 64)")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"of {','.join(PEERS)}; ours is always there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default bf16, on a CPU fp32")
    parser.add_argument("--inner", default="inductor", help="the Dynamo backend below the pass")
    parser.add_argument("--autotune", action="store_true", help="FlexAttention with mode=max-autotune-no-cudagraphs")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds that one peer may take for one row, compile and all")
    parser.add_argument("--budget", type=float, help="seconds after which no further row is begun")
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, help="compile ahead in parallel (default on a GPU)")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="every N-th row, from the I-th (default 1/1)")
    parser.add_argument("--ours", choices=HELD_TO, default="", help="hold the fused op to one implementation")
    parser.add_argument("--host", action="store_true", help="count the time that the host takes to launch a call")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where JSON, markdown and plot go (default out/)")
    parser.add_argument("--json", type=Path, help="where the JSON goes (default benchmark.json in --out)")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="one table of measured parts; measures nothing")
    parser.add_argument(
        "--compile-time", action="store_true", help="time the compile of a GPT-2 with and without the pass, no table"
    )
    parser.add_argument("--train", action="store_true", help="with --compile-time: a training step")
    parser.add_argument("--repeats", type=int, default=3, help="with --compile-time: compiles of each kind (default 3)")
    parser.add_argument("--profile", action="store_true", help="with --compile-time: where the pass spends its time")
    given = parser.parse_args()
    given.warm = given.device == "cuda" if given.warm is None else given.warm
    given.json = given.json or given.out / "benchmark.json"
    for name, allowed in (("cases", CASES), ("peers", PEERS)):
        chosen = getattr(given, name).split(",")
        unknown = [c for c in chosen if c not in allowed]
        if unknown:
            parser.error(f"--{name}: {unknown[0]!r} is not one of {', '.join(allowed)}")
        setattr(given, name, chosen)
    return given


def show(run: Run, rows: Sequence[Row], out: Path) -> bool:
    """Print the table, write it as markdown and as a plot; whether ours is right in every row."""
    shown = [p for p in SHOWN if any(p in row.results for row in rows)]
    (out / "benchmark.md").write_text(markdown(rows, shown, run.title), encoding="utf-8")
    plot(rows, shown, out / "benchmark.png", run.title)
    print("\n".join(["", run.title, table(rows, shown), "", *summary(rows, shown)]))
    return all(row.right("ours") for row in rows)


def main() -> int:
    given = arguments()
    cuda = given.device == "cuda"
    given.out.mkdir(parents=True, exist_ok=True)
    if given.merge:
        run, rows = merge(given.merge)
        save(run, rows, given.json)
        return 0 if show(run, rows, given.out) else 1
    if given.compile_time:
        result = compile_time(given.inner, given.train, given.device, given.profile, given.repeats)
        (given.out / "compile_time.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        return "error" in result
    dtype = DTYPES[given.dtype or ("bf16" if cuda else "fp32")]
    rep_ms = 50 if given.quick else 100
    settings = Settings(
        torch.device(given.device), dtype, given.inner, given.limit, rep_ms, given.autotune, given.ours, given.host
    )
    ints = lambda text: [int(x) for x in text.split(",")]
    sizes = ints(given.sizes or ("512,1024,2048,4096,8192,16384" if cuda else "256,1024"))
    dims = ints(given.dims or ("64,128" if cuda else "64"))
    if given.quick and cuda:
        todo = quick(given.cases)
    else:
        todo = [*(training() if cuda and not given.sizes else ()), *problems(given.cases, sizes, dims, cuda)]
    part, parts = given.part
    todo = todo[part - 1 :: parts]
    # Ours and flex first: a run that is cut short has what matters. cuDNN and efficient are CUDA's.
    peers = [p for p in PEERS if p == "ours" or p in given.peers if cuda or p not in ("cudnn", "efficient")]
    started = time.monotonic()
    seconds = given.budget or (QUICK_SECONDS if given.quick else float("inf"))
    late = warm(todo, peers, settings, min(seconds / 2, 40 + 3.0 * len(todo))) if given.warm else set()
    where = torch.cuda.get_device_name() if cuda else "CPU"
    run = Run(where, str(dtype).removeprefix("torch."), torch.__version__, _triton(), given.ours)
    left = seconds - (time.monotonic() - started)
    rows = measured(todo, peers, settings, left, late, lambda rows: save(run, rows, given.json))
    return 0 if show(run, rows, given.out) else 1


def _triton() -> str:
    try:
        import triton
    except ImportError:  # a CPU may do without
        return ""
    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
