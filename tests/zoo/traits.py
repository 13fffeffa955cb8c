"""What the rules cannot know: parts of configurations that have no default, and fields where a rule gives the wrong size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["AS_DICTS", "CLASSES", "CONFIG_OVERRIDES", "DEFAULTS", "INPUTS", "NEVER", "PARTS", "REPLACED"]

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
AS_DICTS = {"vision-text-dual-encoder", "encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder"}

# Where the first model class of AutoModel is not the whole model.
CLASSES: dict[str, str] = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "bark": "BarkSemanticModel",
}

_HUNYUAN = {"head_dim": 8, "num_key_value_heads": 8}
_MIMI = {"upsample_groups": 8}
_SERIES = {"prediction_length": 8, "context_length": 16, "num_time_features": 1, "d_model": 16}
_COMPASS = {
    k: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
    for k in ("full_attention", "sliding_attention")
}
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32}
_GEMMA4 = {"global_head_dim": 32}

# Configurations of several models of which no single one runs: the part that is measured.
PARTS: dict[str, str] = {"bark": "semantic_config"}

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
    "cohere_compass_text": {"rope_parameters": {k: v | {"mrope_section": [1, 1, 2]} for k, v in _COMPASS.items()}},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {"text_config": {**_GEMMA4, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
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
        "mamba_n_heads": 16,
        "mamba_d_head": 8,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
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
    "align": {"projection_dim": 640, "vision_config": {"divisor": 1, "num_block_repeats": [1] * 7}},
    "efficientnet": {"divisor": 1, "num_block_repeats": [1] * 7},
    "blip-2": {"image_token_id": 270},
    "emu3": {"vocabulary_map": {"<image>": 300, "<|visual token 000000|>": 10, "<|extra_200|>": 11}},
    "eomt": {"num_blocks": 1},
    "eomt_dinov3": {"num_blocks": 1},
    "videomt": {"num_blocks": 1},
    "sam": {"prompt_encoder_config": {"image_size": 64, "image_embedding_size": 4}},
    "sam_hq": {"prompt_encoder_config": {"image_size": 64, "image_embedding_size": 4}},
    "depth_pro": {
        "intermediate_hook_ids": [1, 0],
        "patch_size": 64,
        "image_model_config": {"image_size": 64},
        "patch_model_config": {"image_size": 64},
        "fov_model_config": {"image_size": 64},
    },
    "bros": {"divisor": 2},
    "clvp": {"divisor": 2, "speech_config": {"vocab_size": 512}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "glm4v_moe": {"divisor": 8, "text_config": {"num_attention_heads": 32}},
    "glm4v_moe_text": {"divisor": 8, "num_attention_heads": 32},
    "instructblip": {"image_token_index": 270, "image_token_id": 270},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config": {"model_in_dim": 80}},
    "kosmos-2": {"latent_query_num": 8},
    "layoutlmv3": {"coordinate_size": 16, "shape_size": 16},
    "mobilevit": {"image_size": 64},
    "mobilevitv2": {"image_size": 64},
    "instructblipvideo": {"video_token_index": 270, "video_token_id": 270},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}

# Inputs of single architectures: argument -> function of the `inputs.Context`; and arguments that are not to be given.
INPUTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "blip_2_qformer": {"encoder_hidden_states": lambda c: c.randn(2, 11, c.config.encoder_hidden_size)},
    "clap": {"input_features": lambda c: c.randn(2, 1, 1024, 64), "is_longer": lambda c: torch.tensor([[True], [False]])},
    "clvp": {"input_features": lambda c: c.randn(2, c.find("feature_size"), 32)},
    "decision_transformer": {
        "states": lambda c: c.randn(2, 9, c.config.state_dim),
        "actions": lambda c: c.randn(2, 9, c.config.act_dim),
        "rewards": lambda c: c.randn(2, 9, 1),
        "returns_to_go": lambda c: c.randn(2, 9, 1),
        "timesteps": lambda c: torch.arange(9).expand(2, 9),
        "attention_mask": lambda c: None,
    },
    "depth_pro": {"pixel_values": lambda c: c.randn(2, 3, 256, 256)},
    "fun_asr_nano_encoder": {
        "input_features": lambda c: c.randn(2, 24, 560),
        "input_features_mask": lambda c: torch.ones(2, 24, dtype=torch.int64),
    },
    "gemma4_vision": {
        "pixel_values": lambda c: c.randn(2, 36, 3 * c.config.patch_size**2),
        "pixel_position_ids": lambda c: torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(2, 36, 2),
    },
    "granite_speech5_ctc": {"input_features": lambda c: c.randn(2, 48, 320)},
    "granite_speech5_encoder": {"input_features": lambda c: c.randn(2, 48, 320)},
    "idefics": {
        "pixel_values": lambda c: c.randn(2, 1, 3, *[c.config.vision_config.image_size] * 2),
        "image_attention_mask": lambda c: torch.ones(2, c.length, 1, dtype=torch.int64),
    },
    "kimi_k25_vision": {"pixel_values": lambda c: c.randn(48, 3, 14, 14)},
    "kosmos-2": {"image_embeds_position_mask": lambda c: (torch.arange(c.length) < 8).long().expand(2, c.length)},
    "kyutai_speech_to_text": {"input_ids": lambda c: c.randint(2, 100, 2, c.length, 33)},
    "mimi": {"input_values": lambda c: c.randn(2, 1, 7680)},
    "muse_glimmer_vision": {"pixel_values": lambda c: c.randn(48, 1176)},
    "musicgen": {"decoder_input_ids": lambda c: c.randint(2, 100, 8, 23), "input_values": lambda c: None},
    "musicgen_melody": {"decoder_input_ids": lambda c: c.randint(2, 100, 8, 23), "input_features": lambda c: None},
    "neucodec": {"input_features": lambda c: c.randn(2, 49, 20), "input_features_mask": lambda c: None},
    "perceiver": {"inputs": lambda c: c.randn(2, 37, c.config.d_model)},
    "dia": {"decoder_input_ids": lambda c: c.randint(2, 100, 2, 23, 9)},
    "bros": {"bbox": lambda c: torch.rand(2, 37, 4, generator=c.generator)},
}
NEVER: dict[str, set[str]] = {"llava": {"image_sizes"}}
