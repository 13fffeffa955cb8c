"""The table's rows: how one spelling of attention is written down, and how its inputs are made.

A spelling is a function of tensors, or a module class. It takes the keyword ``twin``: with ``twin=True`` it makes one edit that
changes its meaning. Where the edit makes the site unfusable, ``refused`` names the reason; elsewhere the twin's result must
differ from the spelling's by more than the rule allows, which proves that the numeric test would notice a dropped mask or scale.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusion_pass.site import Reason

__all__ = ["SPELLINGS", "Spelling", "T", "keep", "make_input", "make_inputs", "padding", "qkv", "spelling", "t"]


@dataclass(frozen=True)
class T:
    """One tensor input.

    kind: ``normal`` values, ``keep`` (bool, about three in four True, key 0 always), ``padding`` (bool, True on a prefix of
    random length >= 1), ``additive`` (0 or -inf, from ``keep``), ``ids`` (int64 below 4, sorted along the last dim).
    order: the dims from outermost to innermost in memory; None is contiguous.
    dtype: None is the spelling's own dtype.
    """

    shape: tuple[int, ...]
    kind: str = "normal"
    order: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    grad: bool = True
    scale: float = 1.0
    shift: float = 0.0


def t(*shape: int, **options: Any) -> T:
    return T(shape, **options)


def keep(*shape: int, **options: Any) -> T:
    return T(shape, kind="keep", dtype=options.pop("dtype", torch.bool), grad=False, **options)


def padding(batch: int, keys: int, **options: Any) -> T:
    return T((batch, keys), kind="padding", dtype=options.pop("dtype", torch.bool), grad=False, **options)


def qkv(
    b: int = 2, h: int = 3, n: int = 63, m: int | None = None, d: int = 16, dv: int | None = None, hkv: int | None = None
) -> tuple[T, T, T]:
    """q (b, h, n, d), k (b, hkv, m, d), v (b, hkv, m, dv), contiguous."""
    m, hkv = n if m is None else m, h if hkv is None else hkv
    return t(b, h, n, d), t(b, hkv, m, d), t(b, hkv, m, d if dv is None else dv)


def make_input(spec: T, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The tensor that `spec` describes, drawn from `generator` (a CPU one: the values are the same on every device).

    Float values are exact in the wanted dtype.
    """
    order = spec.order or tuple(range(len(spec.shape)))
    back = tuple(order.index(d) for d in range(len(order)))
    value = _values(spec, tuple(spec.shape[d] for d in order), generator, spec.dtype or dtype)
    value = value.permute(back).to(device)  # strides are kept
    return value.requires_grad_(spec.grad) if spec.kind == "normal" else value


def _values(spec: T, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Values of `spec.kind` in `dtype`, contiguous in `shape`, on the CPU."""
    if spec.kind == "normal":
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * spec.scale + spec.shift).to(dtype)
    if spec.kind == "ids":
        return torch.randint(4, shape, generator=generator).sort(-1).values
    if spec.kind == "padding":
        lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1]) < lengths).to(dtype)
    kept = torch.rand(shape, generator=generator) < 0.75
    kept[..., 0] = True
    if spec.kind == "keep":
        return kept.to(dtype)
    return torch.zeros(shape, dtype=dtype).masked_fill(~kept, -torch.inf)


@dataclass(frozen=True)
class Spelling:
    name: str
    build: Callable[..., Callable[..., Any]]  # (twin, device) -> the function or module
    inputs: tuple[Any, ...]  # T, or a plain number passed as it is
    sites: int
    mask: str | None  # the site must be proved to skip tiles, and the fact must hold this word ("" for any)
    refused: Reason | None  # why the twin is refused; None: the twin fuses too and must differ
    dtype: torch.dtype
    dynamic: bool  # whether it is also compiled with dynamic=True
    against: str  # "exact": the rule against float64; "eager": where float64 means something else (absorbed fills)

    def __str__(self) -> str:
        return self.name

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the module and of every input."""
        return {self.dtype, *(x.dtype for x in self.inputs if isinstance(x, T) and x.dtype is not None)}


SPELLINGS: dict[str, Spelling] = {}


def spelling(
    *inputs: Any,
    sites: int = 1,
    mask: str | None = None,
    refused: Reason | None = None,
    dtype: torch.dtype = torch.float32,
    dynamic: bool | None = None,
    against: str = "exact",
) -> Callable[[Any], Any]:
    """Register the decorated function (``f(*inputs, twin=False)``) or module class (``C(twin=False)``).

    Symbolic shapes are a matter of views and positions: rows about those are compiled with them, others where they ask for it.
    """

    def register(thing: Any) -> Any:
        def build(twin: bool = False, device: torch.device | str = "cpu") -> Callable[..., Any]:
            if inspect.isclass(thing) and issubclass(thing, nn.Module):
                torch.manual_seed(20)
                return thing(twin=twin).to(device, dtype)
            return (lambda *args: thing(*args, twin=True)) if twin else thing

        if thing.__name__ in SPELLINGS:
            raise ValueError(f"two spellings are named {thing.__name__}")
        symbolic = thing.__module__ in ("spellings.layouts", "spellings.structures") if dynamic is None else dynamic
        SPELLINGS[thing.__name__] = Spelling(thing.__name__, build, inputs, sites, mask, refused, dtype, symbolic, against)
        return thing

    return register


def make_inputs(row: Spelling, seed: int = 0, device: torch.device | str = "cpu") -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [make_input(x, generator, row.dtype, device) if isinstance(x, T) else x for x in row.inputs]
