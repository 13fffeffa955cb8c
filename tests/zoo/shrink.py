"""A configuration of transformers made small, by rules on the names of its fields.

Three things are cut, each so that what fitted together still does:

- depth: two layers, or as many as there are different kinds of layers (full and sliding attention, dense and sparse, ...);
- width: every size is divided by one number for the whole configuration, chosen so that no head is narrower than 8. Equal sizes
  stay equal, and products (heads x head dim) stay products, which no table of absolute sizes could promise;
- what is counted: words, experts, positions, queries, and the pixels of a picture, which is four patches wide.

Numbers of heads are left alone. All dropout is switched off: a fused and an eager result are compared.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .rules import COUNTS, DEPTH, DEPTHS, DROPOUT, EXPERT, HEAD_DIM, HEADS, INDICES, LEFT_OUT, MODEL_DIM, TOKEN, WIDTH
from .traits import AS_DICTS, CONFIG_OVERRIDES, DEFAULTS, REPLACED

__all__ = ["default_config", "dropout_off", "small_config"]

Fields = dict[str, Any]

VOCABULARY = 320
LAYERS = 2
MIN_HEAD = 8


def default_config(model_type: str) -> PretrainedConfig:
    """The configuration that `model_type` has by default; where it has none, one made of the parts in `traits.DEFAULTS`."""
    parts: dict[str, Any] = {name: default_config(part) for name, part in DEFAULTS.get(model_type, {}).items()}
    if model_type in AS_DICTS:
        parts = {name: part.to_dict() for name, part in parts.items()}
    return CONFIG_MAPPING[model_type](**parts)


def small_config(model_type: str) -> PretrainedConfig:
    """The small configuration of architecture `model_type`."""
    config, own = default_config(model_type), CONFIG_OVERRIDES.get(model_type, {})
    if _divisor(config) < 8:
        _even_heads(config)
    return _small(config, own.get("divisor", _divisor(config)), own)


def dropout_off(model: Any) -> None:
    """No dropout anywhere: not in modules, nor in the numbers that functional ones read."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (DROPOUT.search(name) or (name == "p" and "Drop" in type(module).__name__)):
                setattr(module, name, 0.0)


# ---------------------------------------------------------------- one configuration


def _small(config: PretrainedConfig, divisor: int, own: Fields) -> PretrainedConfig:
    fields, divisor = _fields(config), own.get("divisor", divisor)
    layers, kinds = _layers(fields | {"_out_indices": vars(config).get("_out_indices")})
    changed: Fields = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            if value.model_type in REPLACED:
                value = CONFIG_MAPPING[REPLACED[value.model_type][0]](**REPLACED[value.model_type][1])
            changed[name] = _small(value, divisor, own.get(name, {}))
            if config.model_type in AS_DICTS:
                changed[name] = changed[name].to_dict()
        elif name in own:
            changed[name] = own[name]
        elif value is not None:
            changed[name] = _field(name, value, divisor, layers, kinds)
    changed = _pictures(changed) | _tokens(changed) | _rope_sections(config, changed)
    changed |= {name: value for name, value in own.items() if name != "divisor" and not isinstance(value, dict)}
    changed |= _stages(config, kinds)
    _joined(changed)
    small = type(config)(**changed)
    for name, value in vars(config).items():  # what a whole has given its part beyond the part's own fields
        if name not in vars(small) and not name.startswith("_"):
            setattr(small, name, _field(name, value, divisor, layers, kinds))
    return small


def _fields(config: PretrainedConfig) -> Fields:
    names = [f.name for f in dataclasses.fields(config) if f.init and f.name not in LEFT_OUT]
    names += [name for name in config.sub_configs if name not in names]
    return {name: vars(config).get(name) for name in names}


def _field(name: str, value: Any, divisor: int, layers: int, kinds: list[int]) -> Any:
    if DROPOUT.search(name):
        return type(value)(0) if isinstance(value, (int, float)) else value
    if isinstance(value, dict):
        return value | {key: _shares(x, divisor) for key, x in value.items() if str(key).endswith("mrope_section")}
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_list(name, list(value), divisor, layers, kinds))
    if not isinstance(value, int):
        return value
    if DEPTH.match(name):
        return min(value, len(kinds) if value == layers else LAYERS)
    for pattern, most in COUNTS.items():
        if pattern.match(name):
            return min(value, most)
    if name.endswith("vocab_size") and name != "type_vocab_size":
        return min(value, VOCABULARY)
    if not _is_width(name):
        return value
    small = _divided(value, divisor)
    return small if small == value or not EXPERT.search(name) else 8 * math.ceil(small / 8)  # grouped products want 16 bytes


def _shares(value: list[int], divisor: int) -> list[int]:
    """Numbers whose sum is divided: what division leaves over goes to the last."""
    parts = [max(1, x // divisor) for x in value[:-1]]
    return [*parts, sum(value) // divisor - sum(parts)]


def _rope_sections(config: PretrainedConfig, fields: Fields) -> Fields:
    """Rotary positions of three axes split a head's frequencies; where no field says how, code does, for a head of 128."""
    rope, heads = fields.get("rope_parameters"), fields.get("num_attention_heads")
    known = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
    if not known or not isinstance(rope, dict) or "rope_theta" not in rope or "mrope_section" in rope or not heads:
        return {}
    half = int((fields.get("head_dim") or fields["hidden_size"] // heads) * rope.get("partial_rotary_factor", 1.0)) // 2
    third = max(1, half // 3)
    return {"rope_parameters": rope | {"mrope_section": [third, third, half - 2 * third]}}


def _list(name: str, value: list[Any], divisor: int, layers: int, kinds: list[int]) -> list[Any]:
    if DEPTHS.match(name) and all(isinstance(x, int) for x in value):
        return [min(x, LAYERS) for x in value]
    if INDICES.search(name) and all(isinstance(x, int) for x in value):
        return sorted({min(x, len(kinds) - 1) for x in value}) if layers else value
    if len(value) == layers and layers > 4:
        value = [value[i] for i in kinds]
    if all(isinstance(x, int) and not isinstance(x, bool) for x in value) and _is_width(name):
        return [_divided(x, divisor) for x in value]
    return value


def _is_width(name: str) -> bool:
    return bool(WIDTH.match(name))


def _divided(value: int, divisor: int) -> int:
    return value // divisor if value % divisor == 0 and value // divisor >= 2 else value


# ---------------------------------------------------------------- depth


def _layers(fields: Fields) -> tuple[int, list[int]]:
    """How many layers there are, and which of them to keep: the first of each kind, and two at least."""
    depths = [v for k, v in fields.items() if isinstance(v, int) and not isinstance(v, bool) and DEPTH.match(k)]
    layers = next(
        (fields[k] for k in ("num_hidden_layers", "num_layers", "n_layer", "depth") if k in fields and fields[k] in depths), 0
    )
    layers = layers or max(depths, default=0)
    columns = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == layers and layers > 4]
    kinds: dict[tuple[str, ...], int] = {}
    for i in range(layers if columns else 0):
        kinds.setdefault(tuple(str(column[i]) for column in columns), i)
    kept = sorted(kinds.values())[:4]
    least = max(LAYERS, len(fields.get("_out_indices") or ()))
    kept += [i for i in range(layers) if i not in kept][: max(0, min(least, layers) - len(kept))]
    return layers, sorted(kept) or list(range(LAYERS))


def _joined(fields: Fields) -> None:
    """What sees gives vectors as wide as those of what reads; the defaults of some do not fit together."""
    eye, reader = fields.get("vision_config"), fields.get("text_config")
    if isinstance(eye, PretrainedConfig) and isinstance(reader, PretrainedConfig) and "hidden_size" in vars(reader):
        out = "out_hidden_size" if "out_hidden_size" in vars(eye) else "hidden_size"
        if out == "out_hidden_size" or {"embed_dim", "depth"} <= vars(eye).keys():
            setattr(eye, out, vars(reader)["hidden_size"])


def _stages(config: PretrainedConfig, kinds: list[int]) -> Fields:
    """The outputs of a backbone: of the same stages, or, where each layer is a stage, of the last ones."""
    wanted, names = vars(config).get("_out_indices"), vars(config).get("stage_names")
    if not wanted or not names:
        return {}
    if any(DEPTHS.match(k) and isinstance(v, (list, tuple)) for k, v in vars(config).items()):
        return {"out_indices": list(wanted)}
    return {"out_indices": list(range(len(kinds) + 1 - len(wanted), len(kinds) + 1))}


# ---------------------------------------------------------------- width


def _divisor(config: PretrainedConfig) -> int:
    """The largest power of two by which every head's width can be divided: `MIN_HEAD` are left, and a multiple of 4, or of 2."""
    widths = list(_head_widths(config))
    divisors = [d for d in (32, 16, 8, 4, 2) if d <= (32 if widths else 8) and all(w // d >= MIN_HEAD for w in widths)]
    for multiple in (4, 2):  # rotary embeddings of a picture's two axes pair up the frequencies of half a head
        fits = [d for d in divisors if all(w % (multiple * d) == 0 for w in widths)]
        if fits:
            return fits[0]
    return 1


def _even_heads(config: PretrainedConfig) -> None:
    """Heads of 72, 80 or 88, which are not divided far, become heads of 64."""
    for part in _fields(config).values():
        if isinstance(part, PretrainedConfig):
            _even_heads(part)
    fields = _fields(config)
    heads = [k for k, v in fields.items() if HEADS.search(k) and isinstance(v, int)]
    width = next((v for k, v in fields.items() if MODEL_DIM.match(k) and isinstance(v, int)), 0)
    odd = len({fields[k] for k in heads}) == 1 and width % fields[heads[0]] == 0 and width // fields[heads[0]] % 32
    if odd and width % 64 == 0 and not any(HEAD_DIM.match(k) and v for k, v in fields.items()):
        for k in heads:
            setattr(config, k, width // 64)


def _head_widths(config: PretrainedConfig) -> Iterator[int]:
    fields = _fields(config)
    for value in fields.values():
        if isinstance(value, PretrainedConfig):
            yield from _head_widths(value)
    explicit = [v for k, v in fields.items() if HEAD_DIM.match(k) and isinstance(v, int) and v >= MIN_HEAD]
    yield from explicit
    heads = [_numbers(v) for k, v in fields.items() if HEADS.search(k) and "key_value" not in k and not k.startswith("linear")]
    sizes = [_numbers(v) for k, v in fields.items() if MODEL_DIM.match(k)]
    for hs, ds in itertools.product(heads, sizes):
        if len(ds) == 1 and len(hs) > 1:  # Swin: the width doubles from stage to stage
            ds = [ds[0] * 2**i for i in range(len(hs))]
        if len(hs) == 1:
            hs = hs * len(ds)
        yield from (d // h for h, d in zip(hs, ds, strict=False) if h and d % h == 0 and d // h >= MIN_HEAD and not explicit)


def _numbers(value: Any) -> list[int]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [value]
    return [x for x in value if isinstance(x, int)] if isinstance(value, (list, tuple)) else []


# ---------------------------------------------------------------- pictures and special tokens


def _pictures(fields: Fields) -> Fields:
    """A picture is four patches wide, and where stages halve it again and again, four after the last; so is a window."""
    size, patch = fields.get("image_size"), fields.get("patch_size")
    if size is None:
        return fields
    stages = max((len(v) for k, v in fields.items() if DEPTHS.match(k) and isinstance(v, (list, tuple))), default=1)
    sides = _numbers(patch) or [16 if stages == 1 else 4]
    width = 4 * max(sides) * 2 ** (stages - 1) if stages == 1 or len(sides) == 1 else 64
    fields = fields | ({"window_size": 4} if stages > 1 and isinstance(fields.get("window_size"), int) else {})
    if isinstance(size, (list, tuple)):
        return fields | {"image_size": type(size)(min(s, width) for s in size)}
    return fields | {"image_size": min(size, width)}


def _tokens(fields: Fields) -> Fields:
    """Special tokens beyond the small vocabulary get numbers of their own below its end."""
    words = min(_vocabularies(fields), default=VOCABULARY)
    used: dict[int, int] = {}
    renamed: Fields = {}
    for name, value in fields.items():
        if not TOKEN.search(name) or isinstance(value, bool) or not (isinstance(value, (int, list))):
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) for i in ids):
            continue
        new = [i if i < words - 40 else used.setdefault(i, words - 1 - len(used)) for i in ids]
        renamed[name] = new if isinstance(value, list) else new[0]
    return renamed


def _vocabularies(fields: Fields) -> Iterator[int]:
    for name, value in fields.items():
        if name == "vocab_size" and isinstance(value, int) and value > 60:
            yield value
        if isinstance(value, PretrainedConfig):
            yield from _vocabularies(_fields(value))
