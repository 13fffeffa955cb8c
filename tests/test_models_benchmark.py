"""examples/models.py: every model can be built, the processes take turns, and the table says what was measured."""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from entries import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import models
from models_cases import MODELS, build
from models_steps import WAYS, Result, measure
from models_table import Run, agree, markdown, summary, table

CPU = torch.device("cpu")
RUN = Run("a GPU", "2.11", "3.6", "5.17", "1.0")

# What stands in for a model: NAME MODEL WAY ... --json PATH. It writes that it has compiled, waits for a line, and is timed.
FAKE = """
import json, sys, time
kind, model, way, path = *sys.argv[1:4], sys.argv[-1]
if kind == "crash":
    sys.exit("it broke")
if kind == "hang":
    time.sleep(60)
write = lambda **found: open(path, "w").write(json.dumps({"model": model, "way": way, **found}))
write(word="compiled", loss=1.0)
if not sys.stdin.readline():
    sys.exit()
if kind == "stuck":
    time.sleep(60)
begun = time.monotonic()
time.sleep(0.1)
write(ms=100.0, left=[str(begun), str(time.monotonic())])
"""


def fake(kind: str, task: models.Task, gpu: str, folder: Path) -> models.Child:
    return models.Child(task, [sys.executable, "-I", "-c", FAKE, kind, *task], os.environ, gpu, folder)


# ---------------------------------------------------------------- the models


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.library != "timm"])
def test_a_model_is_the_same_in_each_way(name: str) -> None:
    model = MODELS[name]
    module, inputs = build(name, "eager", True, CPU)
    again, same = build(name, "sdpa" if model.sdpa else "eager", True, CPU)
    assert module.training
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(x, same[key]) for key, x in inputs.items())
    assert ("attention_mask" in inputs) == model.padded
    first = next(iter(inputs.values()))
    assert first.shape == ((2, 3, 48, 48) if name == "vit" else model.tiny_shape)


def test_every_way_of_a_model_gives_one_loss() -> None:
    found = {way: measure("evoformer", way, True, lambda result: result.word == "compiled") for way in WAYS}
    assert [result.word for result in found.values()] == [""] * 4
    assert (found["ours"].fused, found["ours"].sites, found["compile"].sites) == (2, 2, None)
    assert all(result.ms and result.steps and result.compiling for result in found.values())
    assert agree({("evoformer", way): result for way, result in found.items()})


def test_a_model_that_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure("mpt", "sdpa", True, lambda result: True).word == "-"
    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    assert measure("swin", "ours", True, lambda result: True).word == "no timm"


def test_memory_that_is_lacking_beside_others_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import models_steps

    once, calls = models_steps.Steps.once, []

    def crowded(self: models_steps.Steps) -> torch.Tensor:
        calls.append(self)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return once(self)

    monkeypatch.setattr(models_steps.Steps, "once", crowded)
    failing = [1]
    seen: list[tuple[str, str]] = []
    result = measure("evoformer", "compile", True, lambda result: not seen.append((result.word, result.why)))
    assert seen == [("compiled", "out of memory beside others")]
    assert (result.word, result.why) == ("", "") and result.ms and result.loss
    calls.clear()
    failing = [1, 2]
    assert measure("evoformer", "compile", True, lambda result: True).word == "OOM"


# ---------------------------------------------------------------- the processes


def test_one_after_another_is_timed_on_each_gpu(tmp_path: Path) -> None:
    names = [*MODELS][:6]
    found: list[Result] = []
    children = [fake("fine", (name, "ours"), "01"[i % 2], tmp_path) for i, name in enumerate(names)]
    until = time.monotonic() + 60
    models.wave(children, until, until, found.append)
    assert sorted(result.model for result in found) == sorted(names)
    assert all(result.ms == 100 for result in found)
    spans = {result.model: tuple(map(float, result.left)) for result in found}
    for gpu in (0, 1):
        for a, b in combinations(names[gpu::2], 2):
            assert spans[a][1] <= spans[b][0]
    assert all(child.process.returncode == 0 for child in children)


def test_a_process_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "STUCK", 0.5)
    kinds = {"bert": "crash", "gpt2": "hang", "llama": "stuck", "t5": "fine"}
    found: dict[str, Result] = {}
    children = [fake(kind, (name, "ours"), "0", tmp_path) for name, kind in kinds.items()]
    now = time.monotonic()
    models.wave(children, now + 2, now + 60, lambda result: found.update({result.model: result}))
    words = {name: (found[name].word, found[name].why) for name in kinds}
    assert words["bert"] == ("error", "ended with 1: it broke")
    assert words["gpt2"] == ("late", "it had not compiled in time")
    assert words["llama"] == ("late", "its timing did not end") and found["llama"].loss == 1.0
    assert words["t5"] == ("", "")
    assert all(child.ended for child in children)


def test_what_there_is_no_time_for_is_missing(tmp_path: Path) -> None:
    found: list[Result] = []
    spawn = lambda task, gpu: fake("fine", task, gpu, tmp_path)
    models.waves([("bert", "ours"), ("t5", "ours")], 1, [""], (0.0, 60.0), spawn, found.append)
    assert [(result.model, result.word) for result in found] == [("bert", "missing"), ("t5", "missing")]
    found.clear()
    children = [fake("fine", ("bert", "ours"), "0", tmp_path)]
    models.wave(children, time.monotonic() + 60, time.monotonic(), found.append)
    assert (found[0].word, found[0].loss) == ("missing", 1.0)


def test_processes_compile_alone_on_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASS", "1")
    env = models.environment("1", threads=3)
    assert "FUSION_PASS" not in env  # plain is plain
    assert (env["CUDA_VISIBLE_DEVICES"], env["TORCHINDUCTOR_COMPILE_THREADS"], env["OMP_NUM_THREADS"]) == ("1", "3", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert models.devices() == ["4", "6"]


# ---------------------------------------------------------------- the command


def test_a_run_is_resumed_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def waves(tasks: list[models.Task], jobs: int, gpus: list[str], seconds: object, spawn: object, keep: object) -> None:
        asked.append(tasks)
        for model, way in tasks:
            keep(Result(model, way, ms=5.0, loss=1.0) if way != "compile" else Result(model, way, "late"))  # pyright: ignore

    asked: list[list[models.Task]] = []
    monkeypatch.setattr(models, "waves", waves)
    command = ["models.py", "--tiny", "--models", "t5,bert", "--ways", "compile,ours", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert models.main() == 1  # `compile` is missing, and the other ways
    monkeypatch.setattr(sys, "argv", [*command, "--resume", "--ways", "compile,sdpa"])
    models.main()
    assert asked == [
        [("bert", "ours"), ("t5", "ours"), ("bert", "compile"), ("t5", "compile")],
        [("bert", "compile"), ("t5", "compile"), ("bert", "sdpa"), ("t5", "sdpa")],
    ]
    _, results = models.load(tmp_path / "models.json")
    assert [*results] == [(model, way) for way in ("ours", "compile", "sdpa") for model in ("bert", "t5")]

    later = {("bert", "compile"): Result("bert", "compile", ms=7.0), ("bert", "ours"): Result("bert", "ours", "OOM")}
    run, _ = models.load(tmp_path / "models.json")
    models.save(run, later, tmp_path / "2.json")
    run, results = models.merge([tmp_path / "models.json", tmp_path / "2.json"])
    assert (results["bert", "compile"].ms, results["bert", "ours"].ms) == (7.0, 5.0)
    models.save(RUN, later, tmp_path / "3.json")
    with pytest.raises(ValueError, match="needed: parts of one table"):
        models.merge([tmp_path / "models.json", tmp_path / "3.json"])
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["models.py", "--table", "--json", str(tmp_path / "2.json")])
    assert models.main() == 0
    assert capsys.readouterr().out.startswith("# Whole models\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--models", "bret"], "'bret' is not one of bert"),
        (["--ways", "flex"], "'flex' is not one of ours"),
        ([], "there is no CUDA device here"),
    ],
)
def test_bad_input_is_named(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["models.py", *given])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        models.main()
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- the table


def results(**changed: Result) -> dict[tuple[str, str], Result]:
    found = [
        Result("bert", "ours", ms=40.0, peak_bytes=8 << 30, loss=10.0, gradient=2.0, compiling=30.0, fused=12, sites=12),
        Result("bert", "compile", ms=50.0, peak_bytes=16 << 30, loss=10.01, gradient=2.01, compiling=25.0),
        Result("bert", "sdpa", ms=38.0, peak_bytes=9 << 30, loss=10.2, gradient=2.0, compiling=20.0),
        Result("bert", "ours+sdpa", ms=38.0, peak_bytes=9 << 30, loss=10.2, gradient=2.0, compiling=20.0, fused=0, sites=12),
        *(Result("mpt", way, "-") for way in ("sdpa", "ours+sdpa")),
        Result("mpt", "ours", "OOM", "too large"),
    ]
    return {(r.model, r.way): r for r in found} | {("bert", way): r for way, r in changed.items()}


def test_the_table_and_what_it_comes_to() -> None:
    header, bert, mpt = table(results()).splitlines()
    assert header.split() == ["model", *WAYS, "compile/ours", "sdpa/ours", "fused"]
    assert bert.split() == [
        *(
            "bert",
            "40.0",
            "ms",
            "8.0",
            "GiB",
            "50.0",
            "ms",
            "16.0",
            "GiB",
            "38.0",
            "ms",
            "9.0",
            "GiB",
            "38.0",
            "ms",
            "9.0",
            "GiB",
        ),
        *("1.25", "2.00", "0.95", "1.12", "12/12", "0/12"),
    ]
    assert mpt.split() == ["mpt", "OOM", "?", "-", "-"]
    lines = list(summary(results()))
    assert "ours beside compile (bert): nowhere slower or larger" in lines
    assert "ours beside sdpa (bert): bert slower (0.95)" in lines
    assert "mpt, ours: OOM (too large)" in lines and "mpt, compile: ?" in lines
    assert not any(line.startswith("wrong") for line in lines)
    text = markdown(RUN, results())
    assert "| bert | 40.0 ms 8.0 GiB | 50.0 ms 16.0 GiB |" in text and "a GPU, torch 2.11, transformers 5.17" in text
    assert "- mpt: MPT, 6 layers" in text and "| bert | 10.0000 | 10.0100 | 10.2000 | 10.2000 | 30 s |" in text


@pytest.mark.parametrize("wrong", [{"loss": 10.2}, {"loss": float("nan")}, {"gradient": 2.2}, {"gradient": float("nan")}])
def test_another_loss_or_gradient_is_wrong(wrong: dict[str, float]) -> None:
    found = {task: result for task, result in results().items() if task[0] == "bert"}
    assert agree(found)
    for name, value in wrong.items():
        setattr(found["bert", "ours"], name, value)
    assert not agree(found)
    assert any(line.startswith("wrong: bert: ours: loss") for line in summary(found))
    assert "10.2000! |" in markdown(RUN, found) or wrong != {"loss": 10.2}


def test_a_result_is_written_whole(tmp_path: Path) -> None:
    result = Result("bert", "ours", ms=1.0, left=["1 x why"])
    models.save_one(result, tmp_path / "one.json")
    assert models.load_one(tmp_path / "one.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
    assert json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))["ms"] == 1.0
