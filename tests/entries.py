"""Shared by the tests of the ways in: a tiny attention, a stand-in for the pass that counts, and a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusion_pass.site import Reason, Site, Verdict

ROOT = Path(__file__).resolve().parent.parent


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain attention over (B, H, N, D)."""
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1) @ v


def qkv(n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three (2, 3, n, 4) float32 tensors, the same ones each time."""
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(2, 3, n, 4, generator=generator) for _ in range(3))  # type: ignore[return-value]


@dataclass
class Runs:
    """What the stand-in for the pass was asked to do: (when, number of softmaxes) of each graph."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, *, when: str, graph: int = 0) -> tuple[Site, ...]:
        names = [node.name for node in gm.graph.nodes if "softmax" in str(node.target)]
        self.calls.append((when, len(names)))
        verdict = Verdict(fused=False, reason=Reason.NOT_PROFITABLE, seen="a stand-in", needed="the pass")
        return tuple(Site(i, graph, f"model.py:{i}", "softmax(x)", name, verdict) for i, name in enumerate(names))


def python(code: str, *, cwd: Path = ROOT / "tests", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that sees this checkout; fails the test if it exits with an error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FUSION_PASS")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**env, **environment}, cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done
