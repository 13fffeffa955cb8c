"""The report as a reader sees it, and `explain`, which makes one without touching what it explains."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import pytest
import torch
from entries import Runs, attention, qkv
from fusion_kernels.program import parse

import fusion_pass
from fusion_pass import config, report
from fusion_pass.report import GraphEntry, Report
from fusion_pass.site import AttentionSite, MaskFacts, Operand, Reason, Site, Verdict

ATTENTION = AttentionSite(
    q=Operand((2, 12, 128, 64), torch.bfloat16, True, "q"),
    k=Operand((2, 4, 256, 64), torch.bfloat16, True, "k"),
    v=Operand((2, 4, 256, 32), torch.float32, True, "v"),
    program=parse("captures\nparams 0\n%0 = score"),
    captures=(),
    dropout_p=0.1,
    formula="softmax(q k^T / 8 + mask[b, k])",
    mask=MaskFacts("causal: k <= q", skips=True),
    device=torch.device("cpu"),
    bytes_saved=3 * 1024 * 1024,
)
FUSED = Site(0, 0, "model.py:12 in forward", "  p = scores.softmax(-1)", "softmax", Verdict(True, kernel="triton"), ATTENTION)
REFUSED = Site(
    1,
    0,
    "model.py:40 in pool",
    "w = x.softmax(1)",
    "softmax_1",
    Verdict(False, reason=Reason.SOFTMAX_DIM, seen="softmax over dim 1 of [2, 12, 128, 256]", needed="the last dim"),
)

FUSED_TEXT = """\
fused  model.py:12 in forward
  code     p = scores.softmax(-1)
  shapes   q [2, 12, 128, 64] bfloat16  k [2, 4, 256, 64] bfloat16  v [2, 4, 256, 32] float32
  formula  softmax(q k^T / 8 + mask[b, k])
  mask     causal: k <= q
  dropout  p = 0.1, in the kernel
  kernel   triton
  saved    3.0 MiB of scores and probabilities a forward no longer stored"""
REFUSED_TEXT = """\
refused  model.py:40 in pool
  code     w = x.softmax(1)
  why      the softmax runs over another dim than the keys
  seen     softmax over dim 1 of [2, 12, 128, 256]
  needed   the last dim"""


def test_a_report_in_full() -> None:
    one = Report([GraphEntry(0, (FUSED, REFUSED))])
    headline = "fusion_pass: 1 of 2 attention sites fused, 1 graph"
    assert str(one) == f"{headline}\n\n{FUSED_TEXT}\n\n{REFUSED_TEXT}"
    assert (one.fused, one.refused) == ((FUSED,), (REFUSED,))


def test_layers_that_read_the_same_are_one_block() -> None:
    third = replace(FUSED, attention=replace(ATTENTION, formula="softmax(q k^T / 8 + layers_2_mask[b, k])"))
    first = replace(FUSED, attention=replace(ATTENTION, formula="softmax(q k^T / 8 + layers_0_mask[b, k])"))
    text = str(Report([GraphEntry(0, (first, REFUSED, third, third))]))
    assert "layers_0_mask" in text and "layers_2_mask" not in text
    assert "3 of 4 attention sites fused" in text
    assert text.count("fused x 3  model.py:12 in forward") == 1
    assert "3.0 MiB of scores and probabilities a forward no longer stored each" in text


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/me/env/lib/python3.12/site-packages/transformers/bert.py:12 in forward", "transformers/bert.py:12 in forward"),
        (f"{os.getcwd()}/train.py:3 in attend", "train.py:3 in attend"),
        ("/elsewhere/train.py:3 in attend", "/elsewhere/train.py:3 in attend"),
    ],
)
def test_places_read_as_their_reader_knows_them(source: str, shown: str) -> None:
    assert report._place(source) == shown


def test_reports_without_sites() -> None:
    assert str(Report()) == "fusion_pass: no graph was compiled"
    assert str(Report([GraphEntry(0), GraphEntry(1)])) == "fusion_pass: no softmax found, 2 graphs"


def test_plain_text_to_a_file_and_colour_to_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    one, plain, terminal = Report([GraphEntry(0, (FUSED, REFUSED))]), io.StringIO(), Terminal()
    one.show(plain)
    assert plain.getvalue() == f"{one}\n"
    one.show(terminal)
    assert "softmax(q k^T / 8 + mask[b, k])" in terminal.getvalue()  # brackets are text, not markup


def test_rich_renders_a_report() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    console.print(Report([GraphEntry(0, (FUSED,))]))
    assert "\x1b[" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**39, "2.5 TiB"), (2**60, "1048576.0 TiB")]
)
def test_sizes_read_as_people_say_them(size: int, text: str) -> None:
    assert report._bytes(size) == text


def test_a_graph_break_gives_one_report_and_a_new_compile_a_new_one(runs: Runs) -> None:
    def broken(q, k, v):
        out = attention(q, k, v)
        torch._dynamo.graph_break()
        return attention(out, k, v)

    backend = fusion_pass.make_backend(inner="eager")
    torch.compile(broken, backend=backend)(*qkv())
    first = fusion_pass.last_report()
    assert [len(entry.sites) for entry in first.graphs] == [1, 1]
    assert [site.graph for site in first.sites] == [0, 1]
    torch.compile(attention, backend=backend)(*qkv())
    assert fusion_pass.last_report() is not first
    assert len(fusion_pass.last_report().graphs) == 1
    assert len(first.graphs) == 2


def test_the_report_goes_to_stderr_when_asked_for(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FUSION_PASS_REPORT", "1")
    torch.compile(attention, backend=fusion_pass.make_backend(inner="eager"))(*qkv())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fusion_pass: graph 0: 0 of 1 attention sites fused\n\nrefused  model.py:0\n")


def test_flags_that_are_not_understood_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASS_REPORT", "maybe")
    with pytest.warns(
        UserWarning, match="fusion_pass: FUSION_PASS_REPORT='maybe' is not understood and counts as 0; use one of 0, 1"
    ):
        assert config.report() is False


class Model(torch.nn.Module):
    """Attention with everything that a forward may leave behind: dropout, running statistics, an input changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: list) -> torch.Tensor:
        q = self.norm(q.flatten(2)).view_as(q)
        cache.append(k)
        v.mul_(2)
        return torch.nn.functional.dropout(attention(q * self.scale, k, v), 0.5)


def test_explain_prints_and_returns_the_report_and_leaves_no_trace(runs: Runs, capsys: pytest.CaptureFixture) -> None:
    model, (q, k, v), cache = Model(), qkv(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value, random = v.clone(), torch.random.get_rng_state()
    result = fusion_pass.explain(model, q, k, v, cache=cache)
    assert capsys.readouterr().out == f"{result}\n"
    assert result is fusion_pass.last_report()
    assert len(result.sites) == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(v, value) and cache == []
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_explain_takes_what_is_compiled_already_and_any_number_of_times(runs: Runs) -> None:
    compiled = torch.compile(attention, backend="eager")
    for _ in range(10):  # more often than Dynamo recompiles one function
        assert len(fusion_pass.explain(compiled, *qkv()).sites) == 1


def test_explain_collects_the_graphs_of_a_model_that_is_not_one_frame(runs: Runs) -> None:
    def warmer(q, k, v):
        return attention(q / 2, k, v)

    def outer(q, k, v):
        for layer in (attention, warmer):
            q = layer(q, k, v)
            torch._dynamo.graph_break()  # in a loop: Dynamo leaves the whole frame to Python
        return q

    assert [len(entry.sites) for entry in fusion_pass.explain(outer, *qkv()).graphs] == [1, 1]


def test_explain_raises_what_the_call_raises(runs: Runs) -> None:
    with pytest.raises(RuntimeError):
        fusion_pass.explain(attention, torch.ones(2, 3), torch.ones(4, 5), torch.ones(1))
