"""The models of models.py, with random weights from their configurations.

A model is one module here that takes tensors by name and returns the loss. `source` says how its attention is written: "eager",
products and a softmax; "sdpa", calls of torch's scaled_dot_product_attention by the library's own code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "Model", "build"]


@dataclass(frozen=True)
class Model:
    """One row of the table.

    title: what a reader is told. library: "transformers", "timm" or "" (this file). kind: the transformers' model type.
    shape: (batch, tokens) of text, (batch, pixels) of images, (batch, rows, columns, width) of an MSA. tiny, tiny_shape: what
    replaces config and shape where only the code is tried. padded: the second half of a text is padding, more or less of it.
    sdpa: whether the library has a version of this model that calls scaled_dot_product_attention.
    """

    title: str
    library: str
    kind: str
    shape: tuple[int, ...]
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    tiny_shape: tuple[int, ...] = (2, 33)
    task: str = ""
    padded: bool = False
    sdpa: bool = True
    note: str = ""


_GPT2 = {"n_embd": 1024, "n_layer": 12, "n_head": 16, "n_positions": 2048, "vocab_size": 50257}
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
_LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 32000, "use_cache": False}
_LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
_T5 = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_heads": 12, "dropout_rate": 0.0, "use_cache": False}
_T5 |= {"decoder_start_token_id": 0}
_MPT = {"d_model": 1024, "n_heads": 16, "n_layers": 6, "max_seq_len": 2048, "vocab_size": 50368, "use_cache": False}
_GEMMA2 = {"hidden_size": 1152, "intermediate_size": 4608, "num_hidden_layers": 6, "vocab_size": 32000, "use_cache": False}
_GEMMA2 |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024}
_VIT = {"num_labels": 1000, "problem_type": "single_label_classification"}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}

MODELS = {
    "bert": Model(
        "BERT-base, 32 x 512, padded", "transformers", "bert", (32, 512), _NO_DROPOUT, _SMALL, task="MaskedLM", padded=True
    ),
    "gpt2": Model(
        "GPT-2 medium, 12 layers, 8 x 2048, padded",
        *("transformers", "gpt2", (8, 2048), _GPT2),
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 1},
        task="CausalLM",
        padded=True,
    ),
    "llama": Model(
        "Llama, 8 layers, 2048 wide, 32/8 heads, 2 x 4096",
        *("transformers", "llama", (2, 4096), _LLAMA),
        {**_SMALL, "num_key_value_heads": 2},
        task="CausalLM",
        note="MLP 5632 wide, vocabulary 32,000",
    ),
    "t5": Model(
        "T5-base, 8 x 1024",
        *("transformers", "t5", (8, 1024), _T5),
        {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 97},
        task="Seq2SeqLM",
        note="1024 tokens into the encoder and 1024 into the decoder",
    ),
    "mpt": Model(
        "MPT, 6 layers, 1024 wide, 16 heads, 4 x 2048",
        *("transformers", "mpt", (4, 2048), _MPT),
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 33, "vocab_size": 97},
        task="CausalLM",
        sdpa=False,
    ),
    "gemma2": Model(
        "Gemma-2, 6 layers, 8/4 heads of 256, window 1024, 2 x 4096",
        *("transformers", "gemma2", (2, 4096), _GEMMA2),
        {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
        task="CausalLM",
        note="half as wide as Gemma-2 2B, vocabulary 32,000; the library's SDPA version leaves out the softcap of the scores",
    ),
    "vit": Model(
        "ViT-B/16, 128 images",
        *("transformers", "vit", (128, 224), {**_VIT, **_NO_DROPOUT}),
        {**_SMALL, "image_size": 48},
        (2, 48),
        task="ImageClassification",
    ),
    "swin": Model(
        "Swin-B, 64 images",
        *("timm", "swin_base_patch4_window7_224", (64, 224), {"drop_path_rate": 0.0}),
        {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 11},
        (2, 56),
    ),
    "evoformer": Model(
        "Evoformer rows, 4 blocks, (1, 128, 384, 256), 8 heads",
        *("", "", (1, 128, 384, 256), {"heads": 8, "pair": 128, "blocks": 4}),
        {"heads": 4, "pair": 8, "blocks": 2},
        (1, 3, 17, 32),
        note="row attention with pair bias and gating, nothing else of the block; SDPA as one would write it",
    ),
}


class LossOf(nn.Module):
    """A model of transformers, which finds its loss itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).loss


class Classifier(nn.Module):
    """A model of images, and the cross entropy of its classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels)


class RowAttention(nn.Module):
    """Attention within each row of an MSA, biased by pairs of columns and gated (AlphaFold 2, supplement, algorithm 7)."""

    def __init__(self, width: int, pair: int, heads: int, sdpa: bool) -> None:
        super().__init__()
        self.heads, self.sdpa = heads, sdpa
        self.norm, self.pair_norm = nn.LayerNorm(width), nn.LayerNorm(pair)
        self.qkv, self.bias = nn.Linear(width, 3 * width, bias=False), nn.Linear(pair, heads, bias=False)
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, msa: Tensor, pair: Tensor) -> Tensor:
        """(B, S, N, C) and (B, N, N, P) to (B, S, N, C)."""
        x = self.norm(msa)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, S, H, N, D) each
        bias = self.bias(self.pair_norm(pair)).permute(0, 3, 1, 2)[:, None]  # (B, 1, H, N, N)
        if self.sdpa:  # its fast kernels take four dims
            rows = [t.flatten(0, 1) for t in (q, k, v)]
            out = F.scaled_dot_product_attention(*rows, attn_mask=bias.expand(-1, msa.shape[1], -1, -1, -1).flatten(0, 1))
            out = out.view_as(q)
        else:
            out = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias, -1) @ v
        return self.out(torch.sigmoid(self.gate(x)) * out.transpose(2, 3).flatten(-2))


class Evoformer(nn.Module):
    """`RowAttention` in residual blocks."""

    def __init__(self, width: int, pair: int, heads: int, blocks: int, sdpa: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RowAttention(width, pair, heads, sdpa) for _ in range(blocks))

    def forward(self, msa: Tensor, pair: Tensor) -> Tensor:
        for block in self.blocks:
            msa = msa + block(msa, pair)
        return msa.square().mean()


# ---------------------------------------------------------------- building one


def build(name: str, source: str, tiny: bool, device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module in train mode and its inputs, the same numbers for each source.

    Raises:
        ImportError: the library of the model is not installed.
    """
    model = MODELS[name]
    shape, config = (model.tiny_shape, {**model.config, **model.tiny}) if tiny else (model.shape, model.config)
    make = {"transformers": _transformers, "timm": _timm, "": _evoformer}[model.library]
    torch.manual_seed(0)
    with device:  # weights are made where they stay
        module = make(model, dict(config), shape, source)
        torch.manual_seed(1)
        inputs = _inputs(model, dict(config), shape, getattr(getattr(module, "model", None), "config", None))
    return module.to(device).train(), inputs


def _transformers(model: Model, config: dict[str, Any], shape: tuple[int, ...], source: str) -> nn.Module:
    import transformers

    auto = getattr(transformers, f"AutoModelFor{model.task}")
    made = auto.from_config(transformers.AutoConfig.for_model(model.kind, **config), attn_implementation=source)
    made.loss_type = made.loss_type or f"For{model.task}"  # GPT-2 has none, and falls back with a warning that breaks the graph
    return LossOf(made)


def _timm(model: Model, config: dict[str, Any], shape: tuple[int, ...], source: str) -> nn.Module:
    import timm  # pyright: ignore[reportMissingImports]

    made = timm.create_model(model.kind, pretrained=False, **config)
    for module in made.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = source == "sdpa"  # pyright: ignore[reportArgumentType]
    return Classifier(made)


def _evoformer(model: Model, config: dict[str, Any], shape: tuple[int, ...], source: str) -> nn.Module:
    return Evoformer(shape[-1], sdpa=source == "sdpa", **config)


def _inputs(model: Model, config: dict[str, Any], shape: tuple[int, ...], made: Any) -> dict[str, Tensor]:
    if not model.library:
        b, s, n, c = shape
        pair = torch.randn(b, n, n, config["pair"])
        return {"msa": torch.randn(b, s, n, c, requires_grad=True), "pair": pair.requires_grad_()}
    batch, size = shape
    if model.task in ("", "ImageClassification"):
        name = "pixel_values" if model.task else "images"
        classes = config.get("num_labels", config.get("num_classes", 1000))
        return {name: torch.randn(batch, 3, size, size), "labels": torch.randint(0, classes, (batch,))}
    tokens = torch.randint(3, made.vocab_size, (batch, size))  # the first few may be special
    if not model.padded:
        return {"input_ids": tokens, "labels": tokens.clone()}
    lengths = torch.linspace(size // 2, size, batch).long()
    mask = torch.arange(size) < lengths[:, None]  # (batch, size)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}
