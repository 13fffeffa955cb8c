"""The examples run as a reader runs them, the long one with fewer steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from entries import ROOT, python


def run(script: str, *arguments: str, cwd: Path) -> str:
    """The output of ``python examples/SCRIPT ARGUMENTS...``, run from `cwd`; fails the test if it exits with an error."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, env=env, cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_quickstart_with_fewer_steps(tmp_path: Path) -> None:
    text = run("quickstart.py", "--steps", "60", "--out", str(tmp_path), cwd=tmp_path)
    for line in (
        "6 of 6 sites of MiniLM are fused",
        "the embeddings are equal to float32 rounding",
        "2 of 2 sites of the GPT are fused",
        "the two end at the same loss",
        "the fused one has learned",
    ):
        assert f"ok  {line}" in text
    assert "fused x 6  transformers/models/bert/modeling_bert.py" in text
    assert (tmp_path / "quickstart_loss.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("bert",), ("llama", "--train", "--length", "33")])
def test_hf_model(arguments: tuple[str, ...], tmp_path: Path) -> None:
    text = run("hf_model.py", *arguments, "--inner", "aot_eager", cwd=tmp_path)
    fused, _, total = text.split("fusion_pass: ")[1].split(maxsplit=3)[:3]
    assert fused == total and int(total) > 0
    for line in (line for line in text.splitlines() if line.startswith("largest error")):
        words = line.split()
        eager, ours = float(words[words.index("eager") + 1]), float(words[words.index("fused") + 1])
        assert ours <= 2 * eager + 1e-7  # float32 rounding of values near one


@pytest.mark.slow
def test_the_readme_runs_and_prints_what_it_shows(tmp_path: Path) -> None:
    program, shown = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[:2]
    (tmp_path / "demo.py").write_text(program, encoding="utf-8")
    done = python("import runpy; runpy.run_path('demo.py')", cwd=tmp_path, FUSION_PASS_REPORT="1")
    assert shown in done.stderr


def test_the_text_is_plain_and_stated(tmp_path: Path) -> None:
    data = ROOT / "examples" / "data"
    assert 10_000 < len((data / "words.txt").read_text(encoding="ascii")) < 100_000
    assert "words.txt" in (data / "README.md").read_text(encoding="utf-8")
