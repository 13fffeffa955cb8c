"""The environment switch: ``FUSION_PASS=1 python train.py`` and plain ``torch.compile`` fuses attention.

torch calls `activate` at the end of every ``import torch`` (entry point group ``torch.backends``), so this file
imports `os` and nothing else until the variable is on, and lets no exception out: one would fail the import of torch.

Registering the pass needs ``torch._inductor.config``, and importing Inductor here would cost every program a second.
So a finder waits for that module: when something imports it, the pass is registered as soon as it has been executed. If that
something is our own hook (``from fusion_pass import enable``), the hook has first to be there: it registers at its end.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_CONFIG = "torch._inductor.config"


def activate() -> None:
    """Called by ``import torch``. Registers the pass with Inductor if FUSION_PASS is on; never raises."""
    if os.environ.get("FUSION_PASS", "") in ("", "0"):
        return
    try:
        _activate()
    except Exception as error:
        _say(error)


def _activate() -> None:
    import sys

    from . import config

    when = config.switch()
    if when is None:
        return
    if _CONFIG in sys.modules:
        _register(when)
        return
    sys.meta_path.insert(0, _Finder(when))


def _register(when: str) -> None:
    import sys

    global _waiting
    hook = sys.modules.get(f"{__package__}.hook")
    if hook is not None and not hasattr(hook, "enable"):  # what imports Inductor is the hook itself: it calls `settle`
        _waiting = when
        return
    try:
        from .hook import enable

        enable(when=when)
    except Exception as error:
        _say(error)


_waiting: str | None = None  # what the switch asks for, while the hook is being imported


def settle() -> None:
    """Called by `hook` at the end of its import: registers the pass if Inductor came in with that import. Never raises."""
    global _waiting
    when, _waiting = _waiting, None
    if when is not None:
        _register(when)


def _say(error: Exception) -> None:
    import sys

    if sys.stderr is not None:
        sys.stderr.write(f"fusion_pass: FUSION_PASS is set, but the pass could not be registered, so nothing is fused: {error}\n")


class _Finder:
    """Waits at the head of ``sys.meta_path`` for one module; steps aside once it was asked for."""

    def __init__(self, when: str) -> None:
        self.when = when

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /) -> ModuleSpec | None:
        if fullname != _CONFIG:
            return None
        import sys
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.when)  # type: ignore[assignment]  # a loader by its three methods
        return spec


class _Loader:
    """The module's own loader, and then the registration."""

    def __init__(self, loader: Loader, when: str) -> None:
        self._loader = loader
        self._when = when

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # nobody sees that we were here (resources, pickles)
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(self._when)
