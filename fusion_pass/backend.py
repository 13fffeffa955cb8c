"""The named backend: ``torch.compile(model, backend=flash_backend)``, or ``backend="flash"`` without an import.

A backend is an inner one with the pass before it. With Inductor inside, ``mode=`` and ``options=`` mean what they mean
to Inductor: they go through the class that torch.compile itself uses for it.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .config import When, check_when
from .entry import run_once

__all__ = ["Backend", "flash_backend", "make_backend"]

Compiled = Callable[..., Any]
Inner = str | Callable[..., Compiled]


class Backend:
    """A Dynamo backend: the pass, then `inner`.

    Two backends made alike are equal, so that Dynamo shares compiled code between them.
    """

    def __init__(self, inner: Inner = "inductor", when: str = "profitable") -> None:
        if not isinstance(inner, str) and not callable(inner):
            raise TypeError(
                f"fusion_pass: inner={inner!r} is a {type(inner).__name__}; use the name of a Dynamo backend "
                "(torch._dynamo.list_backends()) or a callable (graph module, inputs) -> callable"
            )
        self.inner = inner
        self.when: When = check_when(when)
        self.__name__ = "flash_backend"  # what torch calls it in errors and logs

    def __call__(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Compiled:
        """Compile one Dynamo graph. Called by torch.compile, which passes its own ``mode=`` and ``options=`` on.

        Raises:
            ValueError: a mode or an option that the inner backend does not know.
        """
        compile_graph = _inductor(mode, options) if self.inner == "inductor" else _other(self.inner, mode, options)
        run_once(gm, when=self.when)
        return compile_graph(gm, example_inputs)

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset``; as Inductor's own, drops the recorded CUDA graphs."""
        trees = sys.modules.get("torch._inductor.cudagraph_trees")
        if trees is not None:
            trees.reset_cudagraph_trees()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and (self.inner, self.when) == (other.inner, other.when)

    def __hash__(self) -> int:
        return hash((Backend, self.inner, self.when))

    def __repr__(self) -> str:
        return f"fusion_pass.make_backend(inner={self.inner!r}, when={self.when!r})"


def make_backend(inner: Inner = "inductor", when: str = "profitable") -> Backend:
    """A backend for torch.compile that fuses attention and hands the rewritten graph on.

    Args:
        inner: what compiles the rewritten graph: "inductor", the name of another Dynamo backend ("aot_eager",
            "eager", ...), or a callable ``(graph module, example inputs) -> callable``.
        when: "profitable" fuses where it pays; "always" fuses every site that can be expressed, whatever its size
            (for tests and measurements).

    Raises:
        ValueError: `when` is not one of the two.
        TypeError: `inner` is neither a name nor a callable.
    """
    return Backend(inner, when)


flash_backend = Backend()


def _inductor(mode: str | None, options: Mapping[str, Any] | None) -> Compiled:
    """Inductor as ``torch.compile(mode=mode, options=options)`` would set it up."""
    from torch._inductor import list_mode_options, list_options

    if mode is not None and mode not in list_mode_options():
        raise ValueError(f"fusion_pass: unknown mode {mode!r}; {_did_you_mean(mode, list(list_mode_options()))}")
    known = list_options() if options else []
    for option in options or ():
        if option.replace("-", "_") not in known:
            raise ValueError(
                f"fusion_pass: unknown option {option!r}; {_did_you_mean(option, known, show=False)}"
                "options= takes Inductor's options (torch._inductor.list_options())"
            )
    try:
        return torch._TorchCompileInductorWrapper(mode, dict(options or {}), None)
    except RuntimeError as error:  # an option of the wrong type
        raise ValueError(f"fusion_pass: options={dict(options or {})!r} were refused by Inductor: {error}") from error


def _other(inner: Inner, mode: str | None, options: Mapping[str, Any] | None) -> Compiled:
    """Another backend, with ``mode=`` and ``options=`` as keyword arguments where they are given, as torch.compile does."""
    from torch._dynamo.backends.registry import lookup_backend

    compiler = lookup_backend(inner)
    given: dict[str, Any] = {name: value for name, value in (("mode", mode), ("options", options)) if value}
    accepted = _keywords(compiler)
    for name, value in given.items():
        if accepted is not None and name not in accepted:
            raise ValueError(f"fusion_pass: {name}={value!r} was given, but the inner backend {inner!r} takes no {name}=")
    return lambda gm, example_inputs: compiler(gm, example_inputs, **given)


def _keywords(function: Callable[..., Any]) -> set[str] | None:
    """The keyword arguments that `function` takes; None where it takes any, or where that cannot be known."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {name for name, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _did_you_mean(name: str, known: Sequence[str], show: bool = True) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}? "
    return f"use one of {', '.join(map(repr, known))}" if show else ""
