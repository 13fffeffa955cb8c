"""The pass in Inductor's own pre-grad hook: plain ``torch.compile(model)`` picks it up.

`enable` registers it; the environment switch does the same as soon as Inductor is imported. A pass that the user
has set before keeps running, before ours, and is back alone after `disable`.

Facts (torch 2.11 to 2.13):
- ``config.pre_grad_custom_pass`` is called with a graph, for the graph of Dynamo and for each body below it. Bodies of
  ``autograd.Function`` are among them and must not be touched, and `run_pass` recurses into those that may be; so only
  a graph with Dynamo's mark (``meta["dynamo_compile_id"]``) is taken. Exported graphs have none: a compiled library
  that leaves Python could not call the op.
- 2.11 takes one pass, 2.13 also a list; both take one, so ours holds what was set before and calls it first.
- 2.11 runs the hook before the cache lookup and pickles the pass into the key. 2.13 may run it after, so that a warm
  cache means that nothing was seen and nothing can be reported; "early" restores the order of 2.11, and the graph
  that is looked up is the rewritten one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from .config import When, check_when
from .entry import run_once

__all__ = ["Enabled", "FusionPass", "disable", "enable"]

GraphPass = Callable[[torch.fx.Graph], Any]


class FusionPass(CustomGraphPass):
    """The pass as Inductor's pre-grad hook takes it. Equal and picklable by its options and its sources."""

    def __init__(self, when: When = "profitable", before: tuple[GraphPass, ...] = ()) -> None:
        self.when: When = when
        self.before = before  # what was set when we came: called first

    def __call__(self, graph: torch.fx.Graph) -> None:
        for earlier in self.before:
            earlier(graph)
        gm = graph.owning_module
        if gm is not None and "dynamo_compile_id" in gm.meta:
            run_once(gm, when=self.when)

    def uuid(self) -> Any | None:
        """Changes with our sources, the options and the passes before; None (not cacheable) if one of those has none."""
        earlier = tuple(p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.before)
        if not all(earlier):
            return None
        return ("fusion_pass", source_hash(), self.when, earlier)

    def __reduce__(self) -> tuple[Any, ...]:
        # The hash travels along, since torch 2.11 makes the pickle itself a part of the cache key.
        return _restore, (self.when, self.before, source_hash())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FusionPass) and (self.when, self.before) == (other.when, other.before)

    def __hash__(self) -> int:
        return hash((FusionPass, self.when, self.before))

    def __repr__(self) -> str:
        return f"FusionPass(when={self.when!r}, before={self.before!r})"


def _restore(when: When, before: tuple[GraphPass, ...], _sources: str) -> FusionPass:
    return FusionPass(when, before)


@functools.cache
def source_hash() -> str:
    """SHA-256 of every source file of both packages: the version that a cache key needs."""
    from fusion_kernels import program

    digest = hashlib.sha256()
    for root in (Path(__file__).parent, Path(program.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Enabled:
    """What `enable` returns: a context manager whose end puts back what was set before `enable`."""

    def __init__(self, before: dict[str, Any]) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
        _write(self._before)


def enable(when: str = "profitable") -> Enabled:
    """Register the pass with Inductor: from now on plain ``torch.compile(model)`` fuses attention.

    Code that is already compiled stays as it is. Calling it again changes `when` and nothing else. A custom pre-grad
    pass that is set keeps running; one that the program assigns later replaces ours, so enable again after that.

    Args:
        when: "profitable" or "always", as in `make_backend`.

    Returns:
        A context manager: ``with fusion_pass.enable(): ...`` puts the former state back at its end.

    Raises:
        ValueError: `when` is not one of the two.
    """
    checked = check_when(when)
    global _made_early
    before = _read()
    ours = [p for p in _passes() if isinstance(p, FusionPass)]
    others = tuple(p for p in _passes() if not isinstance(p, FusionPass))
    earlier = tuple(p for one in ours for p in one.before) + others
    state: dict[str, Any] = {"pre_grad_custom_pass": FusionPass(checked, earlier)}
    if before.get("pre_grad_pass_timing") == "default":
        state["pre_grad_pass_timing"] = "early"
        _made_early = True
    _write(state)
    return Enabled(before)


def disable() -> None:
    """Take the pass out of Inductor's hook, whoever put it there; custom passes of the user stay. Never fails."""
    global _made_early
    passes = _passes()
    if not any(isinstance(p, FusionPass) for p in passes):
        return
    left = [q for p in passes for q in (p.before if isinstance(p, FusionPass) else (p,))]
    state: dict[str, Any] = {"pre_grad_custom_pass": left[0] if len(left) == 1 else left or None}
    if _made_early:
        state["pre_grad_pass_timing"], _made_early = "default", False
    _write(state)


_made_early = False  # whether the timing is ours to put back
_KEYS = ("pre_grad_custom_pass", "pre_grad_pass_timing")  # the second since 2.13


def _read() -> dict[str, Any]:
    return {key: getattr(inductor_config, key) for key in _KEYS if hasattr(inductor_config, key)}


def _write(state: dict[str, Any]) -> None:
    for key, value in state.items():
        setattr(inductor_config, key, value)


def _passes() -> tuple[GraphPass, ...]:
    current = inductor_config.pre_grad_custom_pass
    if current is None:
        return ()
    return tuple(current) if isinstance(current, (list, tuple)) else (current,)
