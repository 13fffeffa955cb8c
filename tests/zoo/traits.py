"""What the rules cannot know: parts of configurations that have no default, and fields where a rule gives the wrong size."""

from __future__ import annotations

from typing import Any

__all__ = ["AS_DICTS", "CLASSES", "CONFIG_OVERRIDES", "DEFAULTS", "INPUTS", "NEVER", "REPLACED"]

# Configurations that cannot be made without parts: field -> model type of the part.
DEFAULTS: dict[str, dict[str, str]] = {
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_melody_decoder"},
    "diffusion_gemma": {"vision_config": "gemma4_vision"},
    "granite4_vision": {"text_config": "granite4_vision_text"},
    "vision-text-dual-encoder": {"vision_config": "vit", "text_config": "bert"},
    "encoder-decoder": {"encoder": "bert", "decoder": "bert"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "gpt2"},
    "speech-encoder-decoder": {"encoder": "wav2vec2", "decoder": "bert"},
}

# Parts that need a package which is not there, and what stands in for them.
REPLACED: dict[str, tuple[str, dict[str, Any]]] = {
    "timm_backbone": ("resnet", {"out_features": ["stage4"]}),
}

# Configurations that take their parts as dictionaries only.
AS_DICTS = {"vision-text-dual-encoder"}

# Where the first model class of AutoModel is not the whole model.
CLASSES: dict[str, str] = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}

_HUNYUAN = {"head_dim": 8, "num_key_value_heads": 8}
_MIMI = {"upsample_groups": 8}
_SERIES = {"prediction_length": 8, "context_length": 16, "num_time_features": 1, "d_model": 16}
_COMPASS = {
    k: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    for k in ("full_attention", "sliding_attention")
}
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32}
_DETR = {"use_timm_backbone": False, "backbone": None}

# Fields of single architectures, by model type; "divisor" is the number that widths are divided by; a nested table is a part's.
CONFIG_OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "aya_vision": {"vision_config": {"num_attention_heads": 12}},
    "chameleon": {"vocabulary_map": {"<image>": 300, "IMGIMGA": 10, "IMGIMGB": 11}},
    "csm": {"codec_config": _MIMI},
    "mimi": _MIMI,
    "kyutai_speech_to_text": {"codec_config": _MIMI},
    "cohere_compass": {"text_config": {"rope_parameters": _COMPASS}},
    "cohere_compass_text": {"rope_parameters": _COMPASS},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "granite4_vision": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "4/8"},
    "neomme": {"divisor": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {
        "divisor": 1,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mamba_d_ssm": 128,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": _HUNYUAN,
    "hunyuan_vl": {"text_config": _HUNYUAN},
    "hunyuan_vl_text": _HUNYUAN,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8, "num_key_value_heads": 8},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": {"indexer_budget": 16, "indexer_compress_ratio": 4, **_QSA}},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 4, **_QSA},
    "seggpt": {"merge_index": 0},
    "tvp": {"visual_prompt_size": 8, "max_img_size": 64},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}

# Inputs of single architectures: argument -> function of the `inputs.Context`; and arguments that are not to be given.
INPUTS: dict[str, dict[str, Any]] = {}
NEVER: dict[str, set[str]] = {}
