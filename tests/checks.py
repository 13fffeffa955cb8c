"""How the tests of the pass compile, run and judge: one place for the rule that a fused result is held to.

The rule: with float64 eager as the truth, a fused result may be wrong by twice what eager itself is wrong by in the same dtypes,
plus an epsilon: half a unit in the last place of the largest value (a result is rounded once, however exact its sum), and sixteen
units of the accumulation's dtype at the scale of the operands (eager's own error is exactly 0 where a row has a single key; that
of a fused backward, which gets ``sum(p dp)`` as ``sum(o do)``, is a few roundings). That scale is 1, or the result's own where
that is larger.

One gradient has no scale of its own: that of a bias of the keys is 0 in exact arithmetic, as such a bias adds one number to all
scores of a row, which softmax does not see. It is the sum over rows of (sum_k ds) q, and what a run returns there are the
roundings of terms that cancel. Their size is not seen from outside; the largest gradient of the run stands for it, which is a
sum of such terms without the cancelling (and more than fair where another gradient is much larger: only 16 roundings of fp32
are measured by it, none of a 16-bit dtype). A gradient counts as 0 if float64, whose own noise is 1e-16, has it below 1e-9 of
the largest.

Of a program in float64 nothing says what eager is wrong by: the truth is eager itself. `rounding_errors` says what to expect, for
programs that are drawn rather than chosen: what eager in fp32 is wrong by, in units of float64.

NaN, inf and -inf must be where eager has them, and nowhere else. Three things are not eager's to say:

- An infinity that float64 has as well may stand where eager has NaN: 0 * inf, of a probability that is too small for its dtype.

- A gradient may be NaN where eager's is inf, never the other way round and never for a number. torch has the derivative of silu
  as g (a + b), the score program as g a + g b, and for an infinite g and an a and b of different signs only the first is inf.
- Where eager's float16 arithmetic overflows (at 65504; fp32 inside the kernel does not), a place that eager has no number for may
  be as float64 has it. The caller says so, from a run in which `Overflow` has seen it happen.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import fusion_pass
from fusion_pass.report import Report

__all__ = ["Exact", "Recorder", "Result", "Watch", "assert_rule", "assert_same", "differs", "fused_nodes", "run", "sites_text"]


class Exact(TorchDispatchMode):
    """Casts to a float dtype become casts to float64: code with ``.float()`` or ``dtype=`` inside gets a float64 meaning."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
            kwargs["dtype"] = torch.float64
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.is_floating_point() and not any(map(_is, tree_leaves((args, kwargs)))):
            return out.double()  # made from numbers, in the default dtype
        return out


class Single(TorchDispatchMode):
    """Casts to float64 become casts to fp32, and numbers that fp32 has not become its largest."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(self._single, args), **tree_map(self._single, dict(kwargs or {})))

    @staticmethod
    def _single(x: Any) -> Any:
        if isinstance(x, float) and math.isfinite(x):
            largest = torch.finfo(torch.float32).max
            return min(max(x, -largest), largest)
        return torch.float32 if x is torch.float64 else x


@dataclass
class Watch(TorchDispatchMode):
    """Notes every op that makes a tensor of at least `numel` elements whose last dims are `tail`, in either order."""

    tail: tuple[int, int]
    numel: int
    seen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel() >= self.numel and sorted(x.shape[-2:]) == sorted(self.tail):
                self.seen.append(f"{func} -> {tuple(x.shape)}")
        return out


# What is no arithmetic: copies of numbers, and memory that nothing was written to yet.
COPIES = ("to_copy", "copy", "masked_fill", "where", "full", "scalar_tensor", "empty", "empty_like", "new_empty", "empty_strided")


def _wide(x: Any) -> Any:
    """An argument of an operation, as the same operation in fp32 gets it: some name the dtype beside the tensor."""
    return x.float() if _is_half(x) else torch.float32 if x is torch.float16 else x


class Overflow(TorchDispatchMode):
    """Sees whether arithmetic in float16 makes an infinity or NaN where the same operation in fp32 has a number.

    A cast, and a number that is written into a mask, are no arithmetic: what they make is part of the program's meaning.
    """

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        checked = not self.seen and not func.is_view and func.overloadpacket.__name__.strip("_") not in COPIES
        wide = tree_map(_wide, (args, kwargs)) if checked else ((), {})
        out = func(*args, **kwargs)
        halves = [_is_half(x) and not bool(x.isfinite().all()) for x in tree_leaves(out)]
        if checked and any(halves) and torch.Tag.nondeterministic_seeded not in func.tags:
            pairs = zip(tree_leaves(out), tree_leaves(func(*wide[0], **wide[1])), halves, strict=True)
            self.seen = any(bool((~x.isfinite() & y.isfinite()).any()) for x, y, half in pairs if half)
        return out


class Recorder:
    """A Dynamo backend that keeps the graphs it is given and runs them by another one, under `watch` where that is set."""

    def __init__(self, inner: str = "eager") -> None:
        self.inner, self.graphs = inner, []
        self.watch: Watch | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(copy.deepcopy(gm))
        compiled = torch._dynamo.lookup_backend(self.inner)(gm, list(example_inputs))

        def watched(*args: Any) -> Any:
            with self.watch or contextlib.nullcontext():  # Dynamo compiles nothing under a mode: it is entered inside
                return compiled(*args)

        return watched

    def lines(self) -> list[tuple[str, str, str]]:
        """Each node's op, target and users, regions of checkpoints included: two equal lists are two equal graphs.

        Symbols are left out: their names differ from one compile to the next.
        """
        nodes = [n for gm in self.graphs for n in _nodes(gm) if n.op != "placeholder" or isinstance(_value(n), Tensor)]
        return [(n.op, str(n.target), str(len(n.users))) for n in nodes]


def _value(node: torch.fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _nodes(gm: GraphModule) -> Iterator[torch.fx.Node]:
    for module in gm.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def fused_nodes(graphs: Iterable[GraphModule]) -> int:
    """How many fused attention ops the graphs hold; on a GPU a plain site becomes torch's own (fusion_pass/plain.py)."""
    targets = [n.target for gm in graphs for n in _nodes(gm) if n.op == "call_function"]
    own = torch.nn.functional.scaled_dot_product_attention
    return sum(x is own or getattr(x, "namespace", None) == "fusion_kernels" for x in targets)


@dataclass
class Result:
    """Outputs and gradients of one run, detached; gradients in the order of the inputs, then the module's parameters."""

    outputs: list[Any]
    gradients: list[Tensor | None]

    def named(self) -> list[tuple[str, Any]]:
        outputs = [(f"output {i}", x) for i, x in enumerate(self.outputs)]
        return outputs + [(f"gradient {i}", x) for i, x in enumerate(self.gradients)]


def run(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    backward: bool = True,
    seed: int = 7,
    watch: Watch | None = None,
) -> Result:
    """Call `fn` and pull a random cotangent back through it. The cotangents depend on the seed and the shapes alone.

    `fn` gets clones, whose values must come back untouched. `watch` is entered for the backward pass alone.
    """
    given = [
        x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) if _is(x) else x for x in inputs
    ]
    before = [x.detach().clone() if _is(x) else x for x in given]
    out = fn(*given)
    outputs = [x for x in tree_leaves(out) if _is(x)]
    generator = torch.Generator().manual_seed(seed)
    parameters = list(fn.parameters()) if isinstance(fn, nn.Module) else []
    sources = [x for x in [*given, *parameters] if _is(x) and x.requires_grad]
    targets = [x for x in outputs if x.requires_grad] if backward else []
    gradients: list[Tensor | None] = []
    if targets and sources:
        with _disable_current_modes():  # `Exact` would not round
            cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in targets]
            cotangents = [c.bfloat16().to(x) for c, x in zip(cotangents, targets, strict=True)]  # the same in every dtype
        with watch or contextlib.nullcontext():
            gradients = list(torch.autograd.grad(targets, sources, cotangents, allow_unused=True))
    for x, y in zip(given, before, strict=True):
        if _is(x):
            assert torch.equal(x.detach().nan_to_num(), y.nan_to_num()), "an input was changed"
    return Result([x.detach() for x in outputs], gradients)


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float16


def overflow(fn: Callable[..., Any], inputs: Sequence[Any]) -> bool:
    """Whether float16 arithmetic of `fn`, forward or backward, overflows."""
    with Overflow() as mode:
        run(fn, inputs)
    return mode.seen


def exactly(fn: Callable[..., Any], inputs: Sequence[Any], *, backward: bool = True, seed: int = 7) -> Result:
    """`run` in float64: the inputs, a module's parameters, and every cast inside."""
    up = tree_map(
        lambda x: x.detach().double().requires_grad_(x.requires_grad) if _is(x) and x.is_floating_point() else x, list(inputs)
    )
    with Exact():
        return run(copy.deepcopy(fn).double() if isinstance(fn, nn.Module) else fn, up, backward=backward, seed=seed)


def rounding_errors(fn: Callable[..., Any], inputs: Sequence[Any]) -> list[float]:
    """What eager is likely wrong by in float64, an entry for each of `Result.named`, of inputs in float64.

    Roundings are linear in the unit: it is what eager is wrong by in fp32, times the ratio of the units, 2^-29.
    """
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    given = [x.detach().float().requires_grad_(x.requires_grad) if _is(x) and x.dtype == torch.float64 else x for x in inputs]
    with Single():
        eager = run(fn, given)
    pairs = zip(eager.named(), exactly(fn, given).named(), strict=True)
    return [ratio * error(x, t) if _is(x) and x.is_floating_point() else 0.0 for (_, x), (_, t) in pairs]


def error(x: Tensor, exact: Tensor, eager: Tensor | None = None) -> float:
    """Largest absolute error over the finite elements; only of those that eager has a number for, where it is given."""
    finite = torch.isfinite(exact) & torch.isfinite(x) & torch.isfinite(x if eager is None else eager)
    return float((x.double() - exact.double())[finite].abs().max()) if bool(finite.any()) else 0.0


def largest(exact: Tensor) -> float:
    finite = exact.double()[torch.isfinite(exact)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def allowed(eager: Tensor, exact: Tensor, scale: float = 1.0, own: float = 0.0) -> float:
    """The rule's bound; `scale` is that of the terms which `exact` is a sum of, and eager is wrong by no less than `own`."""
    work = torch.finfo(torch.float64 if eager.dtype == torch.float64 else torch.float32).eps
    top = largest(exact)
    return 2 * max(error(eager, exact), own) + torch.finfo(eager.dtype).eps / 2 * top + 16 * work * max(scale, top)


KINDS = ("a number", "NaN", "inf", "-inf")


def kinds(x: Tensor) -> Tensor:
    """The position in `KINDS` of what each element is."""
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def misplaced(name: str, x: Tensor, eager: Tensor, exact: Tensor, overflows: bool) -> str:
    """Which NaN and inf are not where they must be; empty if all are. overflows: some float16 number did, in eager."""

    def like(reference: Tensor) -> Tensor:
        alike = kinds(x) == kinds(reference)
        return alike | (x.isnan() & reference.isinf()) if name.startswith("gradient") else alike

    underflows = eager.isnan() & x.isinf() & (kinds(x) == kinds(exact))
    right = like(eager) | underflows
    right |= overflows & ~eager.isfinite() & like(exact)
    if bool(right.all()):
        return ""
    at = (~right).nonzero()[0].tolist()
    found, wanted = (KINDS[int(kinds(t)[tuple(at)])] for t in (x, eager))
    return f"{found} at {at}, eager has {wanted} ({int((~right).sum())} such places)"


def assert_rule(fused: Result, eager: Result, exact: Result, what: str = "", *, overflows: bool = False) -> None:
    """Every output and gradient of `fused` obeys the rule at the top of this file.

    overflows: whether float16 arithmetic overflows in eager.
    """
    siblings = max((largest(t) for t in exact.gradients if t is not None), default=0.0)
    for (name, x), (_, e), (_, t) in zip(fused.named(), eager.named(), exact.named(), strict=True):
        where = f"{what}: {name}"
        assert (x is None) == (e is None), f"{where}: {'missing' if x is None else 'unexpected'}"
        if x is None:
            continue
        assert x.shape == e.shape, f"{where}: shape {tuple(x.shape)}, eager has {tuple(e.shape)}"
        assert x.dtype == e.dtype, f"{where}: {x.dtype}, eager has {e.dtype}"
        if not x.is_floating_point():
            assert torch.equal(x, e), f"{where}: differs"
            continue
        assert not (wrong := misplaced(name, x, e, t, overflows)), f"{where}: {wrong}"
        vanishes = name.startswith("gradient") and largest(t) < 1e-9 * siblings
        got, limit = error(x, t, e), allowed(e, t, max(1.0, siblings) if vanishes else 1.0)
        assert got <= limit, f"{where}: error {got:.3g}, eager's is {error(e, t):.3g}, allowed {limit:.3g}"


def assert_same(fused: Result, eager: Result, what: str = "", *, roundings: float = 64) -> None:
    """Equal to eager itself, up to `roundings` units of its dtype: for what float64 computes otherwise."""
    for (name, x), (_, e) in zip(fused.named(), eager.named(), strict=True):
        assert (x is None) == (e is None), f"{what}: {name}"
        if x is not None:
            rtol = roundings * torch.finfo(e.dtype).eps if e.is_floating_point() else 0.0
            torch.testing.assert_close(x, e, rtol=rtol, atol=rtol, equal_nan=True, msg=lambda m, n=name: f"{what}: {n}: {m}")


def differs(a: Result, b: Result, exact: Result) -> bool:
    """Whether the rule, with `a` as eager, would reject `b`: what a twin must do."""
    try:
        assert_rule(b, a, exact)
    except (AssertionError, ValueError):
        return True
    return False


def sites_text(report: Report) -> str:
    """The report, for the message of a failed assertion."""
    return f"\n{report}"


def compile_always(fn: Callable[..., Any], recorder: Recorder, **options: Any) -> Callable[..., Any]:
    """`fn` compiled by the pass with every expressible site fused, the rewritten graphs kept by `recorder`."""
    torch._dynamo.reset()
    return torch.compile(fn, backend=fusion_pass.make_backend(inner=recorder, when="always"), fullgraph=True, **options)


def assert_fused(report: Report, recorder: Recorder, count: int) -> None:
    """The report and the graphs agree that `count` sites were fused and none was refused."""
    assert len(report.fused) == count and not report.refused, f"{count} fused sites wanted{sites_text(report)}"
    assert fused_nodes(recorder.graphs) == count, f"{fused_nodes(recorder.graphs)} fused ops in the graphs, {count} wanted"
