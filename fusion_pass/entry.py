"""What every way in does with a graph: run the pass once, mark the graph, note the sites in the report.

Nothing that goes wrong in the pass stops the user's compile: the graph goes on as it came, and the report says why. Only
FUSION_PASS_STRICT=1 lets errors through.
"""

from __future__ import annotations

import sys

import torch

from . import config, report
from .config import When
from .site import Site, failed

__all__ = ["MARK", "run_once"]

MARK = "fusion_pass"  # the key in GraphModule.meta that says: the pass has been here


def run_once(gm: torch.fx.GraphModule, *, when: When) -> None:
    """Run the pass on `gm` in place, unless another way in already has.

    A program may name the backend, set FUSION_PASS and call `fusion_pass.enable` at once; the mark on the graph and
    on every body below it (checkpointed regions) makes that one run and one entry in the report.
    """
    if MARK in gm.meta:
        return
    try:
        with report.graph() as entry:
            entry.sites = _sites(gm, when, entry.index)
    except Exception as error:
        if config.strict():
            raise
        if sys.stderr is not None:
            sys.stderr.write(f"fusion_pass: the report of a graph failed, its code is right: {type(error).__name__}: {error}\n")
    for module in gm.modules():
        if isinstance(module, torch.fx.GraphModule):
            module.meta[MARK] = True


def _sites(gm: torch.fx.GraphModule, when: When, graph: int) -> tuple[Site, ...]:
    try:
        from .pipeline import run_pass

        return run_pass(gm, when=when, graph=graph)
    except Exception as error:
        if config.strict():
            raise
        return (Site(0, graph, "", "", "", failed(error)),)
