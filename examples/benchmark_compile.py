"""What the pass adds to the compile time of a 12-layer GPT-2: ``python examples/benchmark.py --compile-time``.

Each measurement is a process of its own with an empty compile cache, so that nothing is warm but the disk. The clock runs
over the first call of the compiled model; `run_pass` and the import of the pass have clocks of their own. The share is the
time in `run_pass` over the compile time without the pass, whatever the compiler saves by having less to compile; the same
ratio of CPU seconds (of the compiling process, which a busy machine does not stretch) is printed beside it.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

LAYERS = 12
GOAL = 0.05  # of the compile time without the pass
KEYS = ("first call", "first call cpu", "run_pass", "run_pass cpu", "import")
LIMIT = 900  # seconds a process may take


def measure(with_pass: bool, inner: str, train: bool, device: str, profile: bool = False) -> dict[str, Any]:
    """Compile once, here: the seconds of the first call, of the pass in it, of the import of the pass before it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=192, n_head=12, n_positions=256, vocab_size=512, use_cache=False)
    config._attn_implementation = "eager"
    model: Any = GPT2LMHeadModel(config)
    model.to(device).train(train)
    tokens = torch.randint(0, config.vocab_size, (2, 128), device=device)

    seconds = {"import": 0.0, "run_pass": 0.0, "run_pass cpu": 0.0}
    profiler = cProfile.Profile()
    backend: Any = inner
    # Dynamo and the inner backend are imported by any compile; what is left is ours.
    torch.compile(torch.nn.Identity(), backend=inner)(torch.ones(1, device=device))
    torch._dynamo.reset()
    if with_pass:
        started = time.perf_counter()
        import fusion_pass
        from fusion_pass import pipeline

        seconds["import"] = time.perf_counter() - started
        backend = fusion_pass.make_backend(inner=inner, when="always")
        run_pass = pipeline.run_pass

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun, cpu = time.perf_counter(), time.process_time()
            try:
                return profiler.runcall(run_pass, *args, **kwargs) if profile else run_pass(*args, **kwargs)
            finally:
                seconds["run_pass"] += time.perf_counter() - begun
                seconds["run_pass cpu"] += time.process_time() - cpu

        pipeline.run_pass = timed
    compiled = torch.compile(model, backend=backend)

    def step() -> None:
        with torch.set_grad_enabled(train):
            loss = compiled(tokens, labels=tokens).loss
            if train:
                loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    started, cpu = time.perf_counter(), time.process_time()
    step()
    seconds["first call"] = time.perf_counter() - started
    seconds["first call cpu"] = time.process_time() - cpu
    result: dict[str, Any] = {**seconds, "fused": 0, "sites": 0, "profile": ""}
    if with_pass:
        import fusion_pass

        report = fusion_pass.last_report()
        result.update(fused=len(report.fused), sites=len(report.sites))
    if profile:
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(15)
        pstats.Stats(profiler, stream=text).sort_stats("cumulative").print_stats("fusion_", 25)
        result["profile"] = text.getvalue()
    return result


def in_fresh_process(arguments: list[str]) -> dict[str, Any]:
    """`measure` in a new process with empty caches; {"error": ...} if it fails or takes too long."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
        try:
            done = subprocess.run([sys.executable, __file__, *arguments], env=env, text=True, capture_output=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {LIMIT} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def compile_time(inner: str, train: bool, device: str, profile: bool = False, repeats: int = 3) -> dict[str, Any]:
    """Print and return the medians of `repeats` compiles without and with the pass, taken in turn."""
    arguments = [f"--inner={inner}", f"--device={device}", *(["--train"] if train else [])]
    runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for _ in range(repeats):
        for with_pass in (False, True):
            result = in_fresh_process([*arguments, *(["--with-pass"] if with_pass else [])])
            if "error" in result:
                print(f"compile time: {'with' if with_pass else 'without'} the pass: {result['error']}")
                return result
            runs[with_pass].append(result)
            clocks = "  ".join(f"{key} {result[key]:.2f} s" for key in KEYS if result[key])
            print(f"{'with' if with_pass else 'without'} the pass: {clocks}", flush=True)
    median = {key: statistics.median(r[key] for r in runs[True]) for key in KEYS}
    without, without_cpu = (statistics.median(r[key] for r in runs[False]) for key in ("first call", "first call cpu"))
    share, share_cpu = median["run_pass"] / without, median["run_pass cpu"] / without_cpu
    last = runs[True][-1]
    what = "training step" if train else "forward"
    print(f"GPT-2, {LAYERS} layers, {what}, {inner} on {device}: medians of {repeats}, each in its own process")
    print(f"  compile without the pass {without:8.2f} s")
    print(f"  compile with the pass    {median['first call']:8.2f} s   ({last['fused']} of {last['sites']} sites fused)")
    print(f"  in run_pass              {median['run_pass']:8.2f} s   {share:.1%} of the compile without it (goal: {GOAL:.0%})")
    print(f"  the same in CPU seconds  {median['run_pass cpu']:8.2f} s   {share_cpu:.1%} of {without_cpu:.2f} s")
    print(f"  importing the pass       {median['import']:8.2f} s   once a process")
    if profile:
        print(in_fresh_process([*arguments, "--with-pass", "--profile"]).get("profile", ""))
    seconds = {
        "with_s": median["first call"],
        "without_s": without,
        "run_pass_s": median["run_pass"],
        "import_s": median["import"],
    }
    return {
        "inner": inner,
        "train": train,
        "device": device,
        **seconds,
        "share": share,
        "cpu_share": share_cpu,
        "fused": last["fused"],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="One compile, timed, as a line of JSON; benchmark.py --compile-time runs several."
    )
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--with-pass", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    print(json.dumps(measure(given.with_pass, given.inner, given.train, given.device, given.profile)))
