"""transformers on a GPU: every site of tiny models runs as one Triton op under Inductor, outputs and gradients by the rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusion_pass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # Inductor's advice; exact products are wanted here
]
transformers = pytest.importorskip("transformers")

SMALL: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99},
    "gpt2": {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 99},
    "llama": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 64, "vocab_size": 99},
    "bloom": {"hidden_size": 128, "n_layer": 2, "n_head": 2, "vocab_size": 99},
}  # fmt: skip


def build(name: str) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(name, **SMALL[name])
    config._attn_implementation = "eager"
    for field in list(vars(config)):
        if "dropout" in field or field.endswith("pdrop"):
            setattr(config, field, 0.0)
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(config, attn_implementation="eager").cuda().train()


def step(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every parameter's gradient, by name; of a random cotangent, the same one in every dtype.

    Not of a loss like the mean square of the output: behind a LayerNorm that is constant, all gradients are 0 but for noise.
    """
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(out, list(weights.values()), cotangent, materialize_grads=True)
    return {"out": out.detach(), **dict(zip(weights, gradients, strict=True))}


def size(name: str, exact: dict[str, torch.Tensor]) -> float:
    """What roundings of the gradient `name` are measured by: its own norm, but for a bias of the keys.

    Such a bias adds one number to all scores of a row, which softmax does not see: its gradient, the sum over rows of
    (sum_k ds) q, is 0, and what a run returns there are the roundings of terms that cancel. The gradient of the same layer's
    weight is a sum of those terms, each times an input of the layer, which a norm has brought to size 1: it stands for them.
    The rounding that counts in 16 bits is that of the output, of half a unit: the kernels read sum_k p dp as do . out.
    """
    own, most = exact[name].norm().item(), max(x.norm().item() for x in exact.values())
    return own if own > 1e-9 * most else exact[name.replace("bias", "weight")].norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_training_step(name: str, dtype: torch.dtype) -> None:
    """Errors in the norm: at most twice eager's, plus half a unit of the dtype and 16 of fp32, as in checks.py."""
    model = build(name).to(dtype)
    ids = torch.randint(1, 99, (3, 197), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 150:] = 0
    exact = step(copy.deepcopy(model).double(), ids, mask)
    eager = step(model, ids, mask)
    fused = step(torch.compile(model, backend=fusion_pass.make_backend(when="always")), ids, mask)
    report = fusion_pass.last_report()
    assert len(report.fused) == 2 and not report.refused, str(report)
    assert {site.verdict.kernel for site in report.fused} == {"triton"}
    roundings = torch.finfo(dtype).eps / 2 + 16 * torch.finfo(torch.float32).eps
    ours = dict(zip(exact, fused.values(), strict=True))  # the names of a compiled model have a prefix
    for what, truth in exact.items():
        error, theirs = ((x[what].double() - truth).norm().item() for x in (ours, eager))
        limit = 2 * theirs + roundings * size(what, exact)
        assert error <= limit, f"{what}: error {error:.2e}, eager's {theirs:.2e}, allowed {limit:.2e}, of {truth.norm():.2e}"
