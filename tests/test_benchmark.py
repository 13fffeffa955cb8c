"""The benchmark measures what it says: on a CPU, at a tiny size; and its table and verdicts, on numbers made up."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from entries import ROOT

sys.path.insert(0, str(ROOT / "examples"))

from benchmark_cases import CASES
from benchmark_measure import Problem, Result, Settings, exact, measure, quiet
from benchmark_table import Row, markdown, summary, table

CPU = Settings(torch.device("cpu"), torch.float32, inner="eager", limit=60)
SMALL = Problem("causal", 1, 4, 17, 8)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import benchmark

    given = "--device cpu --cases full,softcap --sizes 33 --dims 16 --peers eager,flash --inner eager"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *given.split(), "--out", str(tmp_path)])
    assert benchmark.main() == 0
    rows = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["n"], row["d"]) for row in rows] == [("full", 33, 16), ("softcap", 33, 16)]
    assert [set(row["peers"]) for row in rows] == [{"ours", "eager", "flash"}] * 2
    assert all(row["peers"][peer]["backward_ms"] > 0 for row in rows for peer in ("ours", "eager"))
    assert rows[1]["peers"]["flash"]["word"] == "-"  # SDPA has no softcap
    assert "ours is fused and right" in capsys.readouterr().out
    assert "| softcap | 1 | 4 | 33 | 16 |" in (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert (tmp_path / "benchmark.png").stat().st_size > 5_000


def test_parts_make_the_table_of_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import benchmark

    given = "--device cpu --cases full,causal,softcap --sizes 17 --dims 8 --peers eager --inner eager"
    parts = [tmp_path / "1.json", tmp_path / "2.json"]
    for i, path in enumerate(parts, 1):
        arguments = [*given.split(), "--part", f"{i}/2", "--json", str(path), "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
        assert benchmark.main() == 0
    named = lambda path: [row["case"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    assert [named(path) for path in parts] == [["full", "softcap"], ["causal"]]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--merge", *map(str, reversed(parts)), "--out", str(tmp_path)])
    capsys.readouterr()
    assert benchmark.main() == 0
    assert named(tmp_path / "benchmark.json") == ["full", "causal", "softcap"]
    assert "causal N=17 D=8: " in capsys.readouterr().out  # beside `full`, which another part measured

    text = parts[0].read_text(encoding="utf-8")
    parts[0].write_text(text.replace('"ours": ""', '"ours": "triton"'), encoding="utf-8")
    with pytest.raises(ValueError, match="needed: parts of one table"):
        benchmark.main()


def test_a_whole_run_on_a_gpu_has_every_case_at_every_size() -> None:
    import benchmark

    sizes = (512, 1024, 2048, 4096, 8192, 16384)
    rows = benchmark.problems(list(CASES), sizes, (64, 128), cuda=True)
    assert {(p.case, p.n, p.d) for p in rows} == {(case, n, d) for case in CASES for n in sizes for d in (64, 128)}
    assert len(rows) == len(set(rows)) == 108
    assert {p.b * p.n for p in rows} == {benchmark.TOKENS}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--cases", "fll"], "'fll' is not one of full"),
        (["--peers", "xla"], "'xla' is not"),
        (["--part", "3/2"], "'3/2' is not a part: I/N with 1 <= I <= N"),
    ],
)
def test_an_unknown_name_is_named(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import benchmark

    monkeypatch.setattr(sys, "argv", ["benchmark.py", *given])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_the_words_of_sdpa_and_flex_mean_the_plain_source(name: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, n = CASES[name], 300  # longer than the window
    x = case.inputs(2, 4, n, 8, torch.float64, torch.device("cpu"))
    expected = (case.expected or case.source)(*x.arguments)
    if case.sdpa is not None and name != "dropout":
        found = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, **case.sdpa(x))
        torch.testing.assert_close(found, expected)
    if case.flex is not None:
        x = x.detached()  # FlexAttention has no backward on a CPU
        words = case.flex(x)
        blocks = words.mask_mod and create_block_mask(words.mask_mod, 2 if words.by_batch else None, None, n, n, device="cpu")
        with quiet():  # it warns that it was not compiled
            found = flex_attention(x.q, x.k, x.v, words.score_mod, blocks, enable_gqa=case.group > 1)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_one_head_stands_for_all(name: str) -> None:
    case = CASES[name]
    x = case.inputs(2, 4, 17, 8, torch.float64, torch.device("cpu"))
    torch.manual_seed(0)
    errors = exact(case, x)
    assert len(errors.eager) == 1 + len(x.leaves)
    settings = Settings(torch.device("cpu"), torch.float64, limit=60)
    found = measure("eager", Problem(name, 2, 4, 17, 8), x, settings, None)
    assert found.word == "" and found.forward_ms is not None and found.backward_ms is not None
    source = case.expected or case.source
    out = source(*x.arguments)
    gradients = torch.autograd.grad(out, x.leaves, x.do)
    indices = [i for i, t in enumerate(x.arguments) if t.requires_grad]
    full = [out[:, : case.group], *(case.one_head_gradient(i, g) for i, g in zip(indices, gradients, strict=True))]
    assert max(errors.of(full)) < 1e-12


def test_a_program_that_is_not_fused_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_pass import pipeline

    case = CASES["causal"]
    x = case.inputs(1, 4, 17, 8, torch.float32, torch.device("cpu"))
    assert measure("ours", SMALL, x, CPU, exact(case, x)).word == ""
    monkeypatch.setattr(pipeline, "run_pass", lambda gm, *, when, graph=0: ())
    result = measure("ours", SMALL, x, CPU, None)
    assert (result.word, result.forward_ms) == ("unfused", None)


def test_ours_can_be_held_to_one_implementation() -> None:
    case = CASES["causal"]
    x = case.inputs(1, 4, 17, 8, torch.float32, torch.device("cpu"))
    assert measure("ours", SMALL, x, CPU, None).kernel == "aten-cpu"
    held = measure("ours", SMALL, x, replace(CPU, ours="tiled"), exact(case, x))
    assert (held.kernel, held.word, len(held.errors)) == ("tiled", "", 4)


@pytest.mark.parametrize(("milliseconds", "calls"), [(1, 20), (15, 6), (60, 5), (1500, 3)])
def test_every_time_is_a_median(milliseconds: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmark_measure

    made = []
    monkeypatch.setattr(benchmark_measure, "_once_ms", lambda call, cuda: made.append(call) or milliseconds)
    assert benchmark_measure._median_ms(lambda: None, replace(CPU, rep_ms=100)) == milliseconds
    assert len(made) == 1 + calls


def test_a_peer_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    import benchmark_measure

    monkeypatch.setitem(benchmark_measure.PEERS, "eager", lambda case, x, settings: time.sleep(30))
    x = CASES["causal"].inputs(1, 4, 17, 8, torch.float32, torch.device("cpu"))
    started = time.monotonic()
    result = measure("eager", SMALL, x, Settings(torch.device("cpu"), torch.float32, limit=0.2), None)
    assert result.word == "late" and time.monotonic() - started < 10


def test_the_table_and_its_verdict() -> None:
    ours = Result(1.0, 2.0, 3 << 20, [1e-3, 2e-3])
    row = Row(
        Problem("full", 4, 16, 1024, 64),
        {"ours": ours, "flex": Result(1.5, 1.0, 0, [1e-3]), "eager": Result(word="OOM")},
        [1e-3, 1e-3],
    )
    header, line = table([row], ["flex", "eager"]).splitlines()
    assert header.split() == ["case", "B", "H", "N", "D", "fwd", "bwd", "flex", "eager", "MiB", "eager's", "err", "flex's"]
    assert line.split() == ["full", "4", "16", "1024", "64", "1.00", "2.00", "1.50/0.50", "OOM", "3", "OOM", "2.0", "1.0"]
    assert "ours is fused and right" in list(summary([row], ["flex"]))[-1]
    assert "flex      over ours, geometric mean: forward 1.50" in markdown([row], ["flex"], "title")
    for wrong, reason in (
        (Result(1.0, 2.0, 0, [1e-3, 2.1e-3]), "inexact"),
        (Result(1.0, 2.0, 0, [float("nan")]), "inexact"),
        (Result(word="unfused"), "unfused"),
    ):
        row.results["ours"] = wrong
        assert list(summary([row], []))[-1] == f"wrong or missing: full N=1024 D=64 ({reason})"
