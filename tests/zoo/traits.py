"""What the rules cannot know: parts of configurations that have no default, and fields where a rule gives the wrong size."""

from __future__ import annotations

from typing import Any

__all__ = ["CONFIG_OVERRIDES", "DEFAULTS", "INPUTS", "NEVER"]

# Configurations that cannot be made without parts: field -> model type of the part.
DEFAULTS: dict[str, dict[str, str]] = {
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_decoder"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec", "decoder": "musicgen_melody_decoder"},
    "vision-text-dual-encoder": {"vision_config": "vit", "text_config": "bert"},
    "encoder-decoder": {"encoder": "bert", "decoder": "bert"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "gpt2"},
    "speech-encoder-decoder": {"encoder": "wav2vec2", "decoder": "bert"},
}

# Fields of single architectures, by model type; "divisor" is the number that widths are divided by; a nested table is a part's.
CONFIG_OVERRIDES: dict[str, dict[str, Any]] = {}

# Inputs of single architectures: argument -> function of the `inputs.Context`; and arguments that are not to be given.
INPUTS: dict[str, dict[str, Any]] = {}
NEVER: dict[str, set[str]] = {}
