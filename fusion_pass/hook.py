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

from . import autoload
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
    """What `enable` returns: a context manager whose end takes back that call of `enable`, and those made since."""

    def __init__(self, when: When) -> None:
        self.when: When = when
        self.entered = False

    def __enter__(self) -> Enabled:
        self.entered = True
        if self not in _asked:  # `disable` came between, or it is entered a second time
            _asked.append(self)
            _write()
        return self

    def __exit__(self, *_: object) -> None:
        self.entered = False
        if self not in _asked:
            return
        first = end = _asked.index(self)
        while end < len(_asked) and not (end > first and _asked[end].entered):
            end += 1  # a call of `enable` inside a with block lasts as long as the block
        del _asked[first:end]
        _write()


def enable(when: str = "profitable") -> Enabled:
    """Register the pass with Inductor: from now on plain ``torch.compile(model)`` fuses attention.

    Code that is already compiled stays as it is. Calling it again changes `when` and nothing else. A custom pre-grad
    pass that is set keeps running; one that the program assigns later replaces ours, so enable again after that.

    Args:
        when: "profitable" or "always", as in `make_backend`.

    Returns:
        A context manager: ``with fusion_pass.enable(): ...`` puts the former state back at its end. Blocks may end in any
        order: the pass is on, as the innermost of those that are left asks, until the last one ends.

    Raises:
        ValueError: `when` is not one of the two.
    """
    asked = Enabled(check_when(when))
    if not _asked:  # a pass of ours that is there came with settings that were saved and loaded
        _asked.extend(Enabled(p.when) for p in _passes() if isinstance(p, FusionPass))
    _asked.append(asked)
    _write()
    return asked


def disable() -> None:
    """Take the pass out of Inductor's hook, whoever put it there; custom passes of the user stay. Never fails."""
    _asked.clear()
    _write()


_asked: list[Enabled] = []  # calls of `enable` that hold, the innermost last
_made_early = False  # whether the timing is ours to put back


def _write() -> None:
    """Bring Inductor's settings in line with `_asked`; passes of the user stay, in their order."""
    global _made_early
    found = _passes()
    theirs = [p for one in found for p in (one.before if isinstance(one, FusionPass) else (one,))]
    if _asked:
        inductor_config.pre_grad_custom_pass = FusionPass(_asked[-1].when, tuple(theirs))  # type: ignore[assignment]
    elif any(isinstance(p, FusionPass) for p in found):
        inductor_config.pre_grad_custom_pass = theirs[0] if len(theirs) == 1 else theirs or None  # type: ignore[assignment]
    timing = getattr(inductor_config, _TIMING, None)
    if _asked and timing == "default":
        setattr(inductor_config, _TIMING, "early")
        _made_early = True
    elif not _asked:
        if _made_early and timing == "early":  # anything else is what the program has asked for since
            setattr(inductor_config, _TIMING, "default")
        _made_early = False


_TIMING = "pre_grad_pass_timing"  # since 2.13


def _passes() -> tuple[GraphPass, ...]:
    current = inductor_config.pre_grad_custom_pass
    if current is None:
        return ()
    return tuple(current) if isinstance(current, (list, tuple)) else (current,)


autoload.settle()
