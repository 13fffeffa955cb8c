"""Inputs for any architecture, made from the names in its forward signature and the sizes in its configuration.

`MAKERS` says how to make each argument that is known by name. What a name leaves open (is ``pixel_values`` a picture, a film, or
a list of tiles? does sound come as (mels, time) or (time, mels)?) is a `Variant`; `candidates` gives the inputs of all variants,
most usual first, and the caller takes the first that the model accepts in eager mode.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from .traits import INPUTS, NEVER

__all__ = ["Variant", "candidates"]

BATCH, LENGTH, TARGET = 2, 37, 23
PAD = 9  # tokens of the first row that are padding: less than a small model's sliding window

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What names leave open. `str(variant)` is empty for the usual one."""

    pictures: str = "picture"  # (B, C, H, W); "film": (B, T, C, H, W); the same with one: "tiles", and with two: "pair"
    sound: str = "mels first"  # (B, mels, time), or "time first"
    use_pictures: bool = True
    use_sound: bool = True

    def __str__(self) -> str:
        left_out = [name for name, used in (("pictures", self.use_pictures), ("sound", self.use_sound)) if not used]
        return f"without {' and '.join(left_out)}" if left_out else ""


class Context:
    """One model, and where its sizes are to be found."""

    def __init__(self, model: nn.Module, variant: Variant, padded: bool, length: int = LENGTH) -> None:
        self.model, self.variant, self.padded, self.length = model, variant, padded, length
        self.config: Any = model.config
        self.forward = inspect.signature(model.forward).parameters
        self.parts = list(_parts(self.config))
        self.generator = torch.Generator().manual_seed(0)
        self.made: Inputs = {}

    def find(self, *names: str, default: Any = None) -> Any:
        """The first of `names` in the configuration or in a part of it, in the order of `names`."""
        for name in names:
            for part in self.parts:
                value = vars(part).get(name)
                if value is None and name in getattr(part, "attribute_map", {}):
                    value = getattr(part, name, None)
                if value is not None:
                    return value
        return default

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def randint(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    @property
    def vision(self) -> Any:
        return next((p for p in self.parts if _has(p, "patch_size", "image_size", "num_channels")), self.config)

    @property
    def is_decoder(self) -> bool:
        return "past_key_values" in self.forward and not getattr(self.config, "is_encoder_decoder", False)


def _parts(config: Any) -> Iterator[PretrainedConfig]:
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _parts(part)


def _has(part: Any, *names: str) -> bool:
    return any(vars(part).get(name) is not None for name in names)


def _pair(value: Any) -> tuple[int, int]:
    return (value[-2], value[-1]) if isinstance(value, (list, tuple)) and len(value) > 1 else (int(_one(value)), int(_one(value)))


def _one(value: Any) -> int:
    return int(value[0]) if isinstance(value, (list, tuple)) else int(value)


# ---------------------------------------------------------------- text


def words(c: Context) -> int:
    known = [vars(p).get(n) for p in c.parts for n in ("vocab_size", "src_vocab_size", "input_vocab_size", "text_vocab_size")]
    size = min((n for n in known if isinstance(n, int) and n > 1), default=128)
    return size - 45 if size > 120 else size


def tokens(c: Context, length: int | None = None) -> Tensor:
    places = [vars(p).get("max_position_embeddings") for p in c.parts]
    longest = min((n for n in places if isinstance(n, int) and n >= 16), default=c.length)
    return c.randint(2, words(c), BATCH, min(length or c.length, longest))


def mask(c: Context) -> Tensor | None:
    """Ones, and zeros where a row is padded: on the left for decoders, whose last token is to be the newest.

    Of text, else of sound; a picture has no padding.
    """
    if not c.padded:
        return None
    given = [c.made[name] for name in ("input_ids", "inputs", "input_values", "input_features") if name in c.made]
    if not given or given[0].dim() > 3 or ("input_values" in c.made and given[0].dim() == 3):
        return None
    text = not given[0].is_floating_point()
    length = given[0].shape[2 if given[0].dim() == 3 and c.variant.sound == "mels first" else 1]
    keep = torch.ones(BATCH, length, dtype=torch.int64)
    padding = PAD if text else length // 4
    keep[0, slice(padding) if c.is_decoder and text else slice(-padding, None)] = 0
    return keep


def boxes(c: Context, last: int = 4) -> Tensor:
    low, size = c.randint(0, 400, BATCH, c.length, 2), c.randint(1, 400, BATCH, c.length, 2)
    return torch.cat([low, low + size], -1)


# ---------------------------------------------------------------- pictures


def patches_grid(c: Context) -> Tensor:
    return torch.tensor([[1, 4, 4], [1, 4, 8]])


def flat_patches(c: Context) -> Tensor:
    """Pictures as rows of patches: (patches of all pictures, channels * frames * height * width)."""
    side = _one(c.find("patch_size", default=14))
    frames = _one(c.find("temporal_patch_size", default=1))
    channels = _one(c.find("in_channels", "in_chans", "num_channels", default=3))
    return c.randn(int(patches_grid(c).prod(-1).sum()), channels * frames * side * side)


def pictures(c: Context) -> Tensor | None:
    if not c.variant.use_pictures:
        return None
    if "image_grid_thw" in c.forward or "grid_thw" in c.forward:
        return flat_patches(c)
    channels = _one(c.find("num_channels", "in_channels", "in_chans", default=3))
    channels = channels if channels in (1, 3, 4) else 3
    height, width = _pair(c.find("image_size", "img_size", "input_size", default=64))
    if c.variant.pictures == "picture":
        return c.randn(BATCH, channels, height, width)
    frames = {"film": _one(c.find("num_frames", "frames_per_clip", default=1)), "pair": 2, "tiles": 1}[c.variant.pictures]
    return c.randn(BATCH, max(frames, 1), channels, height, width)


def image_sizes(c: Context) -> Tensor | None:
    pixels = c.made.get("pixel_values")
    return None if pixels is None else torch.tensor([list(pixels.shape[-2:])] * BATCH)


# ---------------------------------------------------------------- sound and series


def mels(c: Context) -> Tensor | None:
    if not c.variant.use_sound:
        return None
    bins = _one(
        c.find(
            "num_mel_bins",
            "n_mels",
            "feature_size",
            "feature_projection_input_dim",
            "input_feat_size",
            "input_dim",
            "input_size",
            default=80,
        )
    )
    positions = c.find("max_source_positions")
    if c.variant.sound == "mels first":
        return c.randn(BATCH, bins, 2 * _one(positions) if positions else 96)
    return c.randn(BATCH, 96, bins)


def mels_mask(c: Context) -> Tensor | None:
    made = c.made.get("input_features")
    if made is None:
        return None
    keep = torch.ones(BATCH, made.shape[2 if c.variant.sound == "mels first" else 1], dtype=torch.int64)
    if c.padded:
        keep[0, -keep.shape[1] // 4 :] = 0
    return keep


def wave(c: Context) -> Tensor | None:
    if not c.variant.use_sound:
        return None
    if c.find("num_mel_bins") and c.find("conv_dim") is None:
        return c.randn(BATCH, _one(c.find("max_length", default=96)), _one(c.find("num_mel_bins")))
    if c.variant.sound == "mels first":
        return c.randn(BATCH, 8000)
    return c.randn(BATCH, 1, 7680)


def series(c: Context) -> Tensor:
    length = _one(c.find("context_length", default=32)) + max(c.find("lags_sequence", default=[0]))
    channels = _one(c.find("num_input_channels", "input_size", default=1))
    return c.randn(BATCH, length, channels) if channels > 1 or c.find("num_input_channels") else c.randn(BATCH, length)


def series_time(c: Context) -> Tensor:
    return c.randn(BATCH, c.made["past_values"].shape[1], _one(c.find("num_time_features", default=1)) or 1)


# ---------------------------------------------------------------- the table

Maker = Callable[[Context], Any]

MAKERS: dict[str, Maker] = {
    "input_ids": tokens,
    "inputs": tokens,
    "attention_mask": mask,
    "decoder_input_ids": lambda c: tokens(c, TARGET),
    "bbox": boxes,
    "pixel_values": pictures,
    "pixel_values_videos": lambda c: None if "pixel_values" in c.forward else pictures(c),
    "hidden_states": lambda c: flat_patches(c) if "grid_thw" in c.forward else None,
    "grid_thw": patches_grid,
    "image_grid_thw": lambda c: patches_grid(c) if c.variant.use_pictures else None,
    "image_sizes": image_sizes,
    "input_features": mels,
    "audio_mel": mels,
    "input_features_mask": mels_mask,
    "feature_attention_mask": mels_mask,
    "audio_mel_mask": lambda c: torch.zeros(BATCH, 96, dtype=torch.bool),
    "input_values": wave,
    "past_values": series,
    "past_time_features": series_time,
    "past_observed_mask": lambda c: torch.ones_like(c.made["past_values"]),
    "future_values": lambda c: c.randn(BATCH, _one(c.find("prediction_length", default=8))),
    "future_time_features": lambda c: c.randn(
        BATCH, _one(c.find("prediction_length", default=8)), _one(c.find("num_time_features", default=1)) or 1
    ),
    "past_values_padding": lambda c: torch.zeros_like(c.made["past_values"]),
    "freq": lambda c: torch.zeros(BATCH, 1, dtype=torch.int64),
    "qformer_input_ids": lambda c: tokens(c, 11),
    "use_cache": lambda c: False,
    "return_dict": lambda c: True,
    "mm_token_type_ids": lambda c: torch.zeros(BATCH, c.length, dtype=torch.int64),
    "visual_feats": lambda c: c.randn(BATCH, 11, _one(c.find("visual_feat_dim", default=16))),
    "visual_pos": lambda c: c.randn(BATCH, 11, _one(c.find("visual_pos_dim", default=4))),
    "query_embeds": lambda c: c.randn(BATCH, 7, _one(c.find("hidden_size", default=64))),
}


def candidates(model: nn.Module, model_type: str, padded: bool, length: int = LENGTH) -> Iterator[tuple[Variant, Inputs]]:
    """The inputs of each variant that could mean something to `model`, a batch of two; most usual first.

    Args:
        padded: whether the first row ends (for decoders: begins) in padding, where the model takes a mask.
        length: how many tokens of text.
    """
    names = set(inspect.signature(model.forward).parameters)
    seeing = bool(names & {"pixel_values", "pixel_values_videos", "pixel_values_images"})
    hearing = bool(names & {"input_features", "audio_mel", "input_values"})
    reading = "input_ids" in names
    films = ("picture", "film", "tiles", "pair") if seeing else ("picture",)
    if seeing and _first_is_film(model.config, names):
        films = ("film", "picture", "tiles", "pair")
    sounds = ("mels first", "time first") if hearing else ("mels first",)
    uses = [(True, True)]
    if reading:
        uses += [(True, False)] * (seeing and hearing) + [(False, True)] * seeing + [(True, False)] * hearing
        uses += [(False, False)] * (seeing and hearing)
    seen: list[Variant] = []
    for (see, hear), film, sound in itertools.product(uses, films, sounds):
        variant = Variant(film if see else films[0], sound if hear else sounds[0], see, hear)
        if variant in seen:
            continue
        seen.append(variant)
        yield variant, _inputs(Context(model, variant, padded, length), model_type)


def _first_is_film(config: Any, names: set[str]) -> bool:
    return (
        any(_has(part, "num_frames", "frames_per_clip", "tubelet_size") for part in _parts(config))
        and "image_grid_thw" not in names
    )


def _inputs(c: Context, model_type: str) -> Inputs:
    own = INPUTS.get(model_type, {})
    for name in sorted(c.forward, key=lambda name: name == "attention_mask"):  # it has the shape of the others: last
        maker = own.get(name, MAKERS.get(name))
        if name in NEVER.get(model_type, ()) or maker is None:
            continue
        value = maker(c)
        if value is not None:
            c.made[name] = value
    _place(c, "image", ("pixel_values", "image_grid_thw", "image_sizes"))
    _place(c, "audio", ("input_features", "input_features_mask", "input_values"))
    return dict(c.made)


def _place(c: Context, what: str, sources: tuple[str, ...]) -> None:
    """Put into the text as many tokens that stand for pictures (or sounds) as the model makes of them."""
    token = c.find(f"{what}_token_id", f"{what}_token_index", f"{what}_token")
    features = getattr(c.model, f"get_{what}_features", None)
    ids = c.made.get("input_ids")
    if features is None or ids is None or not isinstance(token, int) or not any(s in c.made for s in sources):
        return
    accepted = inspect.signature(features).parameters
    given = {name: c.made[name] for name in sources if name in c.made and name in accepted}
    try:
        with torch.no_grad():
            rows = _rows(features(**given))
    except Exception:
        return
    if not rows:
        return
    per_row = [rows // BATCH + (rows % BATCH if i == 0 else 0) for i in range(BATCH)]
    if isinstance(grid := c.made.get("image_grid_thw"), Tensor) and what == "image":
        per_row = [int(x) for x in (grid.prod(-1) * rows // int(grid.prod(-1).sum()))]
    longest = max(per_row)
    placed = torch.cat([ids[:, :3], c.randint(2, words(c), BATCH, longest), ids[:, 3:]], 1)
    for i, n in enumerate(per_row):
        placed[i, 3 : 3 + n] = token
    c.made["input_ids"] = placed
    if "attention_mask" in c.made:
        keep = c.made["attention_mask"]
        wide = torch.ones(BATCH, placed.shape[1], dtype=keep.dtype)
        wide[0, slice(2) if c.is_decoder else slice(-PAD, None)] = 0
        c.made["attention_mask"] = wide
    if "mm_token_type_ids" in c.made:
        types = torch.zeros_like(placed)
        types[placed == token] = 1 if what == "image" else 3
        c.made["mm_token_type_ids"] = types


def _rows(out: Any) -> int:
    """How many feature vectors an output holds."""
    if isinstance(out, ModelOutput):
        out = out["pooler_output"] if out.get("pooler_output") is not None else out["last_hidden_state"]
    if isinstance(out, (list, tuple)):
        return sum(_rows(x) for x in out)
    return out.numel() // out.shape[-1]
