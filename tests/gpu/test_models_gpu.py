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


def step(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state
    out = out * mask[..., None]
    weights = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.pow(2).mean(), weights, materialize_grads=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_training_step(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    ids = torch.randint(1, 99, (3, 197), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 150:] = 0
    truth = step(copy.deepcopy(model).double(), ids, mask)
    eager = step(model, ids, mask)
    compiled = torch.compile(model, backend=fusion_pass.make_backend(when="always"))
    fused = step(compiled, ids, mask)
    report = fusion_pass.last_report()
    assert len(report.fused) == 2 and not report.refused, str(report)
    assert {site.verdict.kernel for site in report.fused} == {"triton"}
    largest = max(g.norm() for g in truth[1:])
    for ours, theirs, exact in zip(fused, eager, truth, strict=True):
        scale = max(exact.norm(), 1e-2 * largest)  # the gradient of a key bias is 0: what is left is measured by its siblings
        error, allowed = (ours.double() - exact).norm() / scale, (theirs.double() - exact).norm() / scale
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps, f"{tuple(exact.shape)}: {error:.2e}, eager {allowed:.2e}"
