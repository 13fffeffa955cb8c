"""One architecture, measured: build, run in eager mode, compile with the pass, compare.

`measure` gives one JSON-able record for one way to run it (eval, padded, train). What cannot be built or run in eager mode is a
record too, with the exception.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
import time
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parents[1]))

import checks

import fusion_pass
from fusion_pass import report

from .inputs import Inputs, candidates
from .shrink import dropout_off, small_config
from .sites import Counter
from .traits import CLASSES, PARTS

__all__ = ["RUNS", "Probe", "build", "measure"]

RUNS = ("eval", "padded", "train")
Record = dict[str, Any]


def build(model_type: str, seed: int = 11) -> nn.Module:
    """The architecture, small, eager, with weights that make attention far from uniform and no layer close to nothing."""
    torch.manual_seed(seed)
    config = small_config(model_type)
    config = getattr(config, PARTS[model_type]) if model_type in PARTS else config
    cls = model_class(model_type)
    # Experts as products of batches: those of groups know no float64, and a loop over experts breaks the graph.
    options = {"experts_implementation": "batched_mm"} if getattr(cls, "_can_set_experts_implementation", bool)() else {}
    model = cls._from_config(config, attn_implementation="eager", **options)
    dropout_off(model)
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if not p.is_floating_point():
                continue
            fan = p[0].numel() if isinstance(module, nn.modules.conv._ConvNd) else p.shape[-1] if p.dim() else 1
            with torch.no_grad():
                if p.dim() > 1:
                    nn.init.normal_(p, std=min(0.2, 1.5 / max(fan, 1) ** 0.5))
                else:  # gates and layer scales that begin at 0 would hide what they scale
                    p.add_(0.1 * torch.randn_like(p))
    return model.float()


def model_class(model_type: str) -> Any:
    """The bare model of a type; where it has none, the first with a head that any task of AutoModel knows."""
    from transformers.models.auto import modeling_auto

    tables = [modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES]
    tables += [
        t for name, t in sorted(vars(modeling_auto).items()) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
    ]
    if model_type in CLASSES:
        return getattr(transformers, CLASSES[model_type])
    for table in tables:
        if model_type in table:
            name = table[model_type]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise ValueError(f"zoo: {model_type} has no model class")


class Call(nn.Module):
    """The model as a function of its inputs in a fixed order, giving the floating tensors of its output."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: Any) -> list[Tensor]:
        out = self.model(**dict(zip(self.names, values, strict=True)))
        return _tensors(out)


def _tensors(out: Any) -> list[Tensor]:
    """Depth first; caches are left out."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        return [t for name, x in out.items() if "past_key" not in name and "cache" not in name for t in _tensors(x)]
    if isinstance(out, (list, tuple)):
        return [t for x in out for t in _tensors(x)]
    return []


class Probe:
    """The inner backend: what the pass left of each graph, and what runs of it.

    A graph may be compiled once and run for every layer: `fused` and `refused` count runs.
    """

    def __init__(self, inner: str) -> None:
        self.inner, self.graphs = inner, 0
        self.counter: Counter | None = None
        self.fused = 0
        self.refused: Tally[tuple[str, str, str]] = Tally()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        entry = fusion_pass.last_report().graphs[-1]
        self.graphs += 1
        ops = checks.fused_nodes([gm])
        compiled = torch._dynamo.lookup_backend(self.inner)(gm, list(example_inputs))

        def counted(*args: Any) -> Any:
            self.fused += ops
            for site in entry.sites:
                if not site.verdict.fused:
                    self.refused[_refusal(site)] += 1
            with self.counter or contextlib.nullcontext():  # Dynamo compiles nothing under a mode: it is entered inside
                return compiled(*args)

        return counted


def _refusal(site: Any) -> tuple[str, str, str]:
    reason = site.verdict.reason.value if site.verdict.reason else ""
    return reason, site.verdict.seen[:300], site.source.rsplit("/", 1)[-1].split(" in ")[0]


# ---------------------------------------------------------------- one measurement


def measure(model_type: str, run: str, *, inner: str = "eager") -> Record:
    """Build `model_type`, run it as `run` says, and say what was fused and how exact it is.

    The errors compared are those of single elements, the largest of a run, and vary from one draw of the weights to the next in
    eager mode as in the fused one. Where one draw is beyond the rule, two more are made, and the middle one of three counts:
    what is wrong is so in each.
    """
    records = [_measure(model_type, run, inner, 11)]
    if max(records[0].get("share", 0.0), records[0].get("gradient_share", 0.0)) > 1:
        records += [_measure(model_type, run, inner, seed) for seed in (12, 13)]
        for kind in ("share", "gradient_share"):
            draws = [r.get(kind, math.inf) for r in records]
            records[0] |= {f"{kind}_draws": draws, kind: sorted(draws)[1]}
    return records[0]


def _measure(model_type: str, run: str, inner: str, seed: int) -> Record:
    begin = time.monotonic()
    record: Record = {"name": model_type, "run": run, "state": "build"}
    try:
        model = build(model_type, seed)
        record |= {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
        record["state"] = "eager"
        variant, inputs, sites = _accepted(model, model_type, padded=run != "eval", note=record)
        record |= {
            "inputs": sorted(inputs),
            "variant": str(variant),
            "sites": len(sites.sites),
            "lines": dict(Tally(sites.sites)),
        }
        record["sdpa"] = dict(sites.sdpa)
        record["state"] = "compile"
        _compare(record, model, inputs, run, inner)
        record["state"] = "done"
    except Exception as error:
        if record["state"] == "compile" and not _compiles(model, inputs, run):
            record["state"] = "dynamo"
        record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        record["at"] = _place(error)
    record["seconds"] = round(time.monotonic() - begin, 1)
    return record


def _accepted(model: nn.Module, model_type: str, padded: bool, note: Record) -> tuple[Any, Inputs, Counter]:
    """The first inputs that the model takes; without padding, if it takes none with it."""
    first: Exception | None = None
    for variant, inputs in itertools.chain(*(candidates(model, model_type, p) for p in ((True, False) if padded else (False,)))):
        note["masked"] = padded and "attention_mask" in inputs
        counter = Counter()
        try:
            with torch.no_grad(), counter:
                torch.manual_seed(3)
                model.eval()(**copy.deepcopy(inputs))
        except Exception as error:
            first = first or error
            continue
        if first is not None:
            note["first_error"] = f"{type(first).__name__}: {' '.join(str(first).split())[:300]} ({_place(first)})"
        return variant, inputs, counter
    raise first or ValueError("zoo: no inputs")


def _compare(record: Record, model: nn.Module, inputs: Inputs, run: str, inner: str) -> None:
    train = run == "train"
    call = Call(model, tuple(inputs)).train(train)
    values = list(inputs.values())
    if train:
        for x in (x for x in values if isinstance(x, Tensor) and x.is_floating_point()):
            x.requires_grad_(True)
    seeded = lambda f, **kw: (torch.manual_seed(3), checks.run(f, values, backward=train, **kw))[1]
    with torch.set_grad_enabled(train):
        eager = seeded(call)
    torch._dynamo.reset()
    probe = Probe(inner)
    probe.counter = None if train else Counter()
    with report.collect(), torch.set_grad_enabled(train):
        compiled = torch.compile(call, backend=fusion_pass.make_backend(inner=probe, when="always"))
        fused = seeded(compiled)
    record |= {"graphs": probe.graphs, "fused": probe.fused}
    record["refused"] = [[*key, n] for key, n in probe.refused.most_common()]
    if probe.counter is not None:
        record |= {"left": len(probe.counter.sites), "left_sdpa": sum(probe.counter.sdpa.values())}
    try:
        torch.manual_seed(3)
        with torch.set_grad_enabled(train):
            exact = checks.exactly(call, values, backward=train)
        record["basis"] = "float64"
    except Exception as error:
        exact, record["basis"] = eager, f"eager ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
    record |= _judge(fused, eager, exact, 1.0 if exact is not eager else 4.0)


def _compiles(model: nn.Module, inputs: Inputs, run: str) -> bool:
    """Whether torch.compile alone can do it: what it cannot is not the plugin's."""
    torch._dynamo.reset()
    try:
        with torch.set_grad_enabled(run == "train"):
            torch.compile(Call(model, tuple(inputs)), backend="eager")(*inputs.values())
    except Exception:
        return False
    return True


def _judge(fused: checks.Result, eager: checks.Result, exact: checks.Result, slack: float) -> Record:
    """The largest error of outputs and of gradients, as a share of what `tests/checks.py` allows, times `slack`.

    Where there is no float64 to say what is exact, eager mode stands for it: then its own error is in the difference, and 64
    roundings are allowed as in `checks.assert_same`, four times the 16 of the rule.
    """
    siblings = max((checks.largest(t) for t in exact.gradients if t is not None), default=0.0)
    shares: dict[str, float] = {"output": 0.0, "gradient": 0.0}
    worst: dict[str, str] = {}
    apart = 0.0
    if [x is None for _, x in fused.named()] != [x is None for _, x in eager.named()]:
        worst["gradient"] = "gradients are missing"
    for (name, x), (_, e), (_, t) in zip(fused.named(), eager.named(), exact.named(), strict=True):
        if x is None or e is None or t is None or not x.is_floating_point():
            continue
        kind = name.split()[0]
        wrong = checks.misplaced(name, x, e, t, False) if x.shape == e.shape == t.shape else "another shape"
        if wrong:
            shares[kind], worst[kind] = float("inf"), f"{name}: {wrong}"
            continue
        vanishes = kind == "gradient" and checks.largest(t) < 1e-9 * siblings
        limit = slack * checks.allowed(e, t, max(1.0, siblings) if vanishes else 1.0)
        share = checks.error(x, t) / max(limit, 1e-300)
        top = max(checks.largest(t), 1e-30)
        apart = max(apart, 0.0 if vanishes else checks.error(e, t) / top)
        if share > shares[kind]:
            shares[kind] = share
            worst[kind] = (
                f"{name}: error {checks.error(x, t):.2e}, eager's {checks.error(e, t):.2e}, "
                f"largest {top:.1e}, fused - eager {checks.error(x, e):.1e}"
            )
    finite = all(bool(x.isfinite().all()) for _, x in eager.named() if x is not None)
    return {
        "error": None, "share": round(shares["output"], 3), "gradient_share": round(shares["gradient"], 3),
        "worst": worst, "eager_apart": apart, "finite": finite,
    }  # fmt: skip


def _place(error: BaseException) -> str:
    """The last line of the traceback in transformers or here."""
    frames: Iterator[Any] = iter(())
    tb, last = error.__traceback__, ""
    while tb is not None:
        path = tb.tb_frame.f_code.co_filename
        if "/transformers/" in path or "/zoo/" in path or "/fusion_" in path:
            last = f"{path.rsplit('/', 1)[-1]}:{tb.tb_lineno}"
        tb = tb.tb_next
    del frames
    return last


def quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
