"""What every way in does with a graph: run the pass once, mark the graph, note the sites in the report."""

from __future__ import annotations

import torch

from . import report
from .config import When

__all__ = ["MARK", "run_once"]

MARK = "fusion_pass"  # the key in GraphModule.meta that says: the pass has been here


def run_once(gm: torch.fx.GraphModule, *, when: When) -> None:
    """Run the pass on `gm` in place, unless another way in already has.

    A program may name the backend, set FUSION_PASS and call `fusion_pass.enable` at once; the mark on the graph and
    on every body below it (checkpointed regions) makes that one run and one entry in the report.
    """
    if MARK in gm.meta:
        return
    from .pipeline import run_pass

    with report.graph() as entry:
        entry.sites = run_pass(gm, when=when, graph=entry.index)
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.meta[MARK] = True
