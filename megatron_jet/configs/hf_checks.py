"""Types of the keys of a config.json that are read here, checked before anything is done with them. No torch."""

import math
from collections.abc import Callable
from typing import Any

from megatron_jet.configs.errors import UserError

MAX_LAYERS = 10_000  # far above any model; a wrong number would otherwise make lists of that length

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "sliding_window",
)
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor")
FLAGS = ("tie_word_embeddings", "qkv_bias", "qk_norm", "attention_bias", "mlp_bias", "use_sliding_window")
NAMES = ("model_type", "base_model_type", "hidden_act")
MAPPINGS = ("rope_scaling", "rope_parameters", "efficient_attention_config")


def check_types(config: Any, where: str) -> None:
    """Raise UserError that names the first key whose value cannot be meant. Missing keys and null are not judged here.

    Args:
        config: content of a config.json.
        where: names the file in messages.
    """
    if not isinstance(config, dict):
        raise UserError(f"{where}: holds no mapping of settings")
    for keys, fits, what in RULES:
        for key in keys:
            value = config.get(key)
            if value is not None and not fits(value):
                raise UserError(f"{where}: {key}={_short(value)} is not {what}")
    if (config.get("num_hidden_layers") or 0) > MAX_LAYERS:
        raise UserError(f"{where}: num_hidden_layers={config['num_hidden_layers']} is above {MAX_LAYERS}")
    for kind, settings in (config.get("efficient_attention_config") or {}).items():
        if not isinstance(settings, dict):
            raise UserError(f"{where}: efficient_attention_config.{kind}={_short(settings)} is not a mapping")
        window = settings.get("window_size")
        if window is not None and not is_size(window):
            raise UserError(
                f"{where}: efficient_attention_config.{kind}.window_size={_short(window)} is not a whole number above 0"
            )
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(config.get(key) or {}, f"{where}: {key}")


def _check_rope(rope: dict[str, Any], where: str) -> None:
    kinds = sorted(key for key, value in rope.items() if isinstance(value, dict))
    if kinds:
        raise UserError(f"{where} differs per kind of layer ({', '.join(kinds)}); only one for all layers is supported")
    theta = rope.get("rope_theta")
    if theta is not None and not is_number(theta):
        raise UserError(f"{where}.rope_theta={_short(theta)} is not a finite number above 0")
    if rope.keys() - {"rope_theta"} and not isinstance(rope.get("rope_type", rope.get("type")), str):
        raise UserError(f"{where} has no rope_type; without it nobody can tell which scaling is meant")


def is_integer(value: Any) -> bool:
    """A whole number; in Python true and false are numbers, here they are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_size(value: Any) -> bool:
    """A whole number above 0."""
    return is_integer(value) and value > 0


def is_number(value: Any) -> bool:
    """A finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def is_token(value: Any) -> bool:
    """A token id or several."""
    return is_integer(value) or (isinstance(value, list) and bool(value) and all(is_integer(item) for item in value))


def is_names(value: Any) -> bool:
    """A list of names, or its text."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def is_windows(value: Any) -> bool:
    """A list with a size, or null, per layer."""
    return isinstance(value, list) and all(item is None or is_size(item) for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (SIZES, is_size, "a whole number above 0"),
    (NUMBERS, is_number, "a finite number above 0"),
    (FLAGS, lambda value: isinstance(value, bool), "true or false"),
    (NAMES, lambda value: isinstance(value, str), "a name"),
    (MAPPINGS, lambda value: isinstance(value, dict), "a mapping of settings"),
    (("max_window_layers",), lambda value: is_integer(value) and value >= 0, "a whole number"),
    (("bos_token_id", "pad_token_id"), is_integer, "a token id"),
    (("eos_token_id",), is_token, "a token id or a list of them"),
    (("layer_types",), is_names, "a list of names"),
    (("windows",), is_windows, "a list of whole numbers above 0 and null"),
)
