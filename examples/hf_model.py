"""Any architecture of transformers with random weights and eager attention: what is fused, and how exact it is.

    python examples/hf_model.py bert
    python examples/hf_model.py gpt2 --length 129 --train
    python examples/hf_model.py --help

The model is small (two layers where the configuration says how many), the batch is padded, and the errors are those of
the outputs in float32, eager and fused, against eager in float64.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import os
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

import fusion_pass

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# What makes a configuration small, by the names that configurations use; a name that one does not have is left out.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"), 2
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("head_dim", "d_kv"), 16),
    "num_key_value_heads": 2,
    "word_embed_proj_dim": 64,
    "image_size": 32,
    "patch_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "max_source_positions": 64,
    "num_mel_bins": 16,
}
# Where a name means something else, or several depend on each other.
OWN: dict[str, dict[str, Any]] = {
    "t5": {"num_heads": 4},
    "swin": {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 2},
    "gpt_neo": {"num_heads": 4, "window_size": 16},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},
}


def small_config(name: str) -> PretrainedConfig:
    """The configuration of architecture `name`, small, without special tokens that a small vocabulary lacks."""
    plain = AutoConfig.for_model(name)
    own = OWN.get(name, {})
    given = {key: value for key, value in SMALL.items() if getattr(plain, key, None) is not None}
    given = {key: value for key, value in given.items() if plain.attribute_map.get(key) not in own}
    tokens = {key: 1 for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id") if hasattr(plain, key)}
    return AutoConfig.for_model(name, **{**given, **tokens, **own})


def inputs_of(model: torch.nn.Module, length: int) -> dict[str, torch.Tensor]:
    """A batch of two for `model`: tokens of which the second row is padded, or pictures, or sound."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    kind = model.main_input_name
    if kind == "pixel_values":
        shape = (2, config.num_channels, config.image_size, config.image_size)
        return {kind: torch.randn(shape, generator=generator)}
    tokens = torch.randint(2, config.vocab_size, (2, length), generator=generator)
    if kind == "input_features":
        sound = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {kind: sound, "decoder_input_ids": tokens}
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - min(length // 3, 12) :] = 0  # less than a sliding window: each row keeps a key
    given = {"input_ids": tokens, "attention_mask": mask}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = tokens[:, : max(1, length // 2)]
    return given


def output_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states; those of padded positions, which nobody reads, are zeroed."""
    caches = (
        {"use_cache": False} if "use_cache" in inspect.signature(getattr(model, "_orig_mod", model).forward).parameters else {}
    )
    hidden = model(**inputs, **caches).last_hidden_state
    mask = inputs.get("attention_mask")
    return hidden if mask is None or mask.shape != hidden.shape[:2] else hidden * mask.unsqueeze(-1)


def on(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: t.to(DEVICE, dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the model type: bert, gpt2, llama, gemma2, t5, vit, swin, mpt, bloom, whisper, ...")
    parser.add_argument("--length", type=int, default=67, help="tokens (default 67)")
    parser.add_argument("--train", action="store_true", help="train mode, without dropout; gradients are compared too")
    parser.add_argument("--inner", default="inductor", help="the Dynamo backend below the pass (default inductor)")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="transformers")

    torch.manual_seed(0)
    model: Any = AutoModel.from_config(small_config(given.name), attn_implementation="eager").to(DEVICE).train(given.train)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_rate", "drop_prob"):  # the functional ones read a number
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    inputs = inputs_of(model, given.length)
    print(f"{given.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {', '.join(inputs)}, {DEVICE}\n")

    compiled = torch.compile(model, backend=fusion_pass.make_backend(inner=given.inner, when="always"))
    runs = [(copy.deepcopy(model).double(), torch.float64), (model, torch.float32), (compiled, torch.float32)]
    results = []
    with torch.set_grad_enabled(given.train):
        for run, dtype in runs:
            run.zero_grad()
            out = output_of(run, on(inputs, dtype))
            if given.train:
                # The gradient of a random cotangent: that of the mean square of a normalised output would be 0 but for noise.
                out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
            # One vector of all gradients: their size differs from one parameter to the next, and so does eager's error.
            # Of a weight that nothing reads, AOT autograd gives zeros and eager None.
            grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in run.parameters()]
            results.append((out.detach().double(), torch.cat(grads).double() if given.train else None))

    report = fusion_pass.last_report()
    report.show()
    (exact, exact_grad), (eager, eager_grad), (fused, fused_grad) = results
    print(f"\nlargest error of the output:     eager {largest(eager, exact):.2e}  fused {largest(fused, exact):.2e}")
    if exact_grad is not None and eager_grad is not None and fused_grad is not None:
        errors = largest(eager_grad, exact_grad), largest(fused_grad, exact_grad)
        print("largest error of the gradients:  eager {:.2e}  fused {:.2e}".format(*errors))


def largest(value: torch.Tensor, exact: torch.Tensor) -> float:
    return (value - exact).abs().max().item()


if __name__ == "__main__":
    main()
