"""Any architecture of transformers with random weights and eager attention: what is fused, and how exact it is.

    python examples/hf_model.py bert
    python examples/hf_model.py gpt2 --length 129 --train
    python examples/hf_model.py --help

The model is small (two layers, widths divided alike: tests/zoo/shrink.py), its batch padded where it takes a mask, and the errors
are those of all outputs in float32, eager and fused, against eager in float64. `make zoo` measures every architecture so, and
docs/zoo.md is the table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the zoo knows how to shrink a model and what to give it

import torch
from checks import Exact
from zoo.inputs import candidates
from zoo.measure import Call, build

import fusion_pass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOTHING = contextlib.nullcontext()


def accepted(model: torch.nn.Module, name: str, length: int) -> dict[str, Any]:
    """The first inputs that the model takes: some names leave open what they mean."""
    refused: list[Exception] = []
    for _, inputs in candidates(model, name, padded=True, length=length):
        try:
            with torch.no_grad():
                model(**copy.deepcopy(inputs))
        except Exception as error:
            refused.append(error)
            continue
        return inputs
    raise refused[0]


def on(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the model type: bert, gpt2, llama, gemma2, t5, vit, swin, mpt, bloom, whisper, ...")
    parser.add_argument("--length", type=int, default=67, help="tokens of text (default 67)")
    parser.add_argument("--train", action="store_true", help="train mode, without dropout; gradients are compared too")
    parser.add_argument("--inner", default="inductor", help="the Dynamo backend below the pass (default inductor)")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="transformers")

    model = build(given.name).eval()
    inputs = accepted(model, given.name, given.length)
    print(f"{given.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {', '.join(inputs)}, {DEVICE}\n")

    call: Any = Call(model, tuple(inputs)).to(DEVICE).train(given.train)
    compiled = torch.compile(call, backend=fusion_pass.make_backend(inner=given.inner, when="always"))
    runs = [
        (copy.deepcopy(call).double(), torch.float64, Exact()),
        (call, torch.float32, NOTHING),
        (compiled, torch.float32, NOTHING),
    ]
    outputs, gradients = [], []
    with torch.set_grad_enabled(given.train):
        for run, dtype, casts in runs:
            run.zero_grad()
            with casts:
                out = run(*(on(x, dtype) for x in inputs.values()))
            outputs.append(flat(out))
            if given.train:
                # The gradient of a random cotangent: that of the mean square of a normalised output would be 0 but for noise.
                torch.manual_seed(1)
                cotangents = [torch.randn(x.shape).to(x) for x in out]
                torch.autograd.backward(
                    [x for x in out if x.requires_grad], [c for c, x in zip(cotangents, out) if x.requires_grad]
                )
                # One vector of all gradients: their size differs from one parameter to the next, and so does eager's error.
                # Of a weight that nothing reads, AOT autograd gives zeros and eager None.
                gradients.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in run.parameters()]))

    fusion_pass.last_report().show()
    print()
    for what, found in (("the output:    ", outputs), ("the gradients: ", gradients)):
        if found:
            exact, eager, fused = found
            print(f"largest error of {what} eager {largest(eager, exact):.2e}  fused {largest(fused, exact):.2e}")


def largest(value: torch.Tensor, exact: torch.Tensor) -> float:
    return (value - exact).abs().max().item()


if __name__ == "__main__":
    main()
