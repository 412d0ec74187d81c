"""Hugging Face config.json <-> ModelConfig, for plain Qwen2, Qwen3 and Llama and for both hybrid formats. No torch.

`jet_nemotron` is the published format; it knows jet, attn and swa layers with one window for the model. `megatron_jet`
is its superset: more mixers, a window per layer, other base models. A model is written in the narrowest format that
fits.
"""

import json
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.families import FAMILIES
from megatron_jet.configs.hf_checks import check_types, is_names, is_number, is_size
from megatron_jet.configs.hf_keys import check_keys
from megatron_jet.configs.hf_rope import rope_key, rope_keys, rope_scaling
from megatron_jet.configs.layer_plan import LayerPlan, split_entry
from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.mixers.registry import LINEAR_MIXERS, mixer_config_class
from megatron_jet.configs.model import ModelConfig

HYBRID_ARCHITECTURES = {
    "jet_nemotron": "JetNemotronForCausalLM",
    "megatron_jet": "MegatronJetForCausalLM",
}
ARCHITECTURES = {name: family.architecture for name, family in FAMILIES.items()} | HYBRID_ARCHITECTURES
HYBRIDS = tuple(HYBRID_ARCHITECTURES)
EXPANSION_DIGITS = 10  # that published files give of expand_v, after the point
PUBLISHED_KEY_VALUE_HEADS = 2  # of a hybrid's config.json that does not say
DEFAULT_WINDOW, DEFAULT_FIRST_WINDOW = 4096, 28  # transformers' of Qwen2 and Qwen3, where windows are switched on


def model_from_hf(config: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a config.json.

    Args:
        config: its content.
        where: names the file in messages.

    Raises:
        UserError: a model type, mixer or setting that this project cannot express, or a key that is missing.
    """
    check_types(config, where)
    try:
        return _model(config, where)
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from None


def _model(config: dict[str, Any], where: str) -> ModelConfig:
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(f"{where}: model_type '{model_type}' is not supported; known: {', '.join(ARCHITECTURES)}")
    base = config.get("base_model_type") or "qwen2" if model_type in HYBRIDS else model_type
    if base not in FAMILIES:
        raise UserError(f"{where}: base_model_type '{base}' is not supported; known: {', '.join(FAMILIES)}")
    family, hybrid = FAMILIES[base], model_type in HYBRIDS
    check_keys(config, hybrid, ARCHITECTURES[model_type], where)
    where_rope = rope_key(config, hybrid)
    rope = config.get(where_rope) or {}
    heads = _required(config, "num_attention_heads", where)
    hidden = _required(config, "hidden_size", where)
    num_layers = _required(config, "num_hidden_layers", where)
    return ModelConfig.parse(
        {
            "hidden_size": hidden,
            "intermediate_size": _required(config, "intermediate_size", where),
            "num_layers": num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": _key_value_heads(config, hybrid, heads),
            "head_dim": config.get("head_dim") or _default_head_dim(model_type, hidden, heads),
            "vocab_size": _required(config, "vocab_size", where),
            "max_position_embeddings": config.get("max_position_embeddings", 32768),
            "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or (1e6 if hybrid else 1e4)),
            "rope_scaling": rope_scaling(rope, f"{where}: {where_rope}"),
            "rms_norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "initializer_range": config.get("initializer_range", 0.02),
            # What the hybrid formats mean without a key is what their modeling code takes, whatever the base model is.
            "tie_word_embeddings": _flag(config, "tie_word_embeddings", hybrid),
            "qkv_bias": _flag(config, "qkv_bias", hybrid or family.qkv_bias),
            "qk_norm": _flag(config, "qk_norm", not hybrid and family.qk_norm),
            "base_model_type": base,
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": config.get("eos_token_id"),
            "pad_token_id": config.get("pad_token_id"),
            "mixers": _mixers(config, where) if hybrid else {},
            "layer_plan": _plan(config, model_type, num_layers, where),
        },
        where,
    )


def model_to_hf(model: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """Write a config.json, without the `auto_map` of shipped code.

    Args:
        model: the model.
        dtype: type of the saved weights, as torch names it.
    """
    model_type = hf_model_type(model)
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.rms_norm_eps,
        "use_cache": True,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_keys(model.rope_scaling),
        "attention_dropout": 0.0,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "torch_dtype": dtype,
    }
    if model.pad_token_id is not None:
        config["pad_token_id"] = model.pad_token_id
    derived = model_type == "jet_nemotron" and _derives_head_dim(model)
    if not derived and not (model_type in FAMILIES and FAMILIES[model_type].derives_head_dim):
        config["head_dim"] = model.head_dim
    if model_type in FAMILIES and not FAMILIES[model_type].qkv_bias:
        config["attention_bias"] = False
    if model_type in HYBRIDS:
        config |= _hybrid_keys(model, model_type)
    return config


def hf_model_type(model: ModelConfig) -> str:
    """The narrowest format that can express a model."""
    kinds = {split_entry(entry)[0] for entry in model.layer_plan}
    family = FAMILIES[model.base_model_type]
    as_its_family = (model.qkv_bias, model.qk_norm) == family.traits
    if kinds == {"attn"} and as_its_family and (_derives_head_dim(model) or not family.derives_head_dim):
        return model.base_model_type
    one_window = len({split_entry(entry)[1] for entry in model.layer_plan} - {None}) <= 1
    like_published = model.base_model_type == "qwen2" and as_its_family
    if kinds <= {"jet", "swa", "attn"} and one_window and like_published and model.rope_scaling is None:
        return "jet_nemotron"
    return "megatron_jet"


def _derives_head_dim(model: ModelConfig) -> bool:
    return model.head_dim * model.num_attention_heads == model.hidden_size


def _hybrid_keys(model: ModelConfig, model_type: str) -> dict[str, Any]:
    entries = [split_entry(entry) for entry in model.layer_plan]
    windows = [window for _, window in entries]
    distinct = sorted({window for window in windows if window is not None})
    settings: dict[str, Any] = {}
    for kind in LINEAR_MIXERS:
        if any(entry_kind == kind for entry_kind, _ in entries):
            settings[kind] = _mixer_keys(model.mixers[kind])
    if distinct:
        settings["swa"] = {"window_size": distinct[0]}
    keys: dict[str, Any] = {"layer_types": [kind for kind, _ in entries], "efficient_attention_config": settings}
    if model_type == "jet_nemotron":
        keys |= {"max_window_layers": model.num_layers, "use_mrope": False}  # Qwen2's, as published; nothing reads them
    else:
        keys |= {"base_model_type": model.base_model_type, "qkv_bias": model.qkv_bias, "qk_norm": model.qk_norm}
        if len(distinct) > 1:
            keys["windows"] = windows
    return keys


def _mixer_keys(mixer: MixerConfig) -> dict[str, Any]:
    """Settings of a mixer; JetBlock's with the keys and spellings of the published files."""
    settings = mixer.to_dict()
    if mixer.kind == "jet":
        settings.pop("static_kernel")  # a training ablation: its generator is zero in the weights
        settings |= {"norm_eps": short_float(mixer.norm_eps), "expand_v": _published_expansion(mixer)}
    return {**_published_extras(mixer.kind), **settings}


def short_float(value: float) -> str:
    """The shortest text of a number, with an exponent as people write it: 1e-5."""
    digits, e, exponent = repr(value).partition("e")
    return f"{digits}{e}{int(exponent)}" if e else digits


def _published_expansion(mixer: MixerConfig) -> float | int:
    """d_v / d_k as published: 2 for a whole number, 2.6666666667 for 256 / 96. `_exact` takes it back.

    The published code cuts d_k * expand_v and heads * d_k * expand_v down to whole numbers, so the tenth digit goes up
    where the nearest one would give a width too few.
    """
    d_k, d_v, heads, exact = mixer.head_dim, mixer.head_v_dim, mixer.num_heads, mixer.head_v_dim / mixer.head_dim
    if exact == int(exact):
        return int(exact)
    nearest = round(exact, EXPANSION_DIGITS)
    if (int(d_k * nearest), int(heads * d_k * nearest)) == (d_v, heads * d_v):
        return nearest
    return round(nearest + 10**-EXPANSION_DIGITS, EXPANSION_DIGITS)


def _exact(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with d_v / d_k of whole widths in place of a rounded expand_v."""
    expansion, d_k = settings.get("expand_v"), settings.get("head_dim")
    if is_number(expansion) and is_size(d_k):
        d_v = round(d_k * expansion)
        if abs(d_v / d_k - expansion) < 2 * 10**-EXPANSION_DIGITS:
            return settings | {"expand_v": d_v / d_k}
    return settings


def _published_extras(kind: str) -> dict[str, str]:
    """Two keys of the published files that choose kernels there and mean nothing here."""
    return {"mode": "chunk", "dconv_implementation": "triton"} if kind == "jet" else {}


def _plan(config: dict[str, Any], model_type: str, num_layers: int, where: str) -> LayerPlan:
    types = config.get("layer_types")
    if isinstance(types, str):  # some copies of the published files hold the list as a string
        try:
            types = json.loads(types.replace("'", '"'))
        except ValueError:
            types = None
        if not isinstance(types, list) or not is_names(types):
            raise UserError(f"{where}: layer_types '{config['layer_types']}' is not a list of mixer names")
    if model_type not in HYBRIDS:
        return _plain_plan(config, types, num_layers, where)
    if types is None:
        raise UserError(f"{where}: layer_types is missing; name the mixer of each layer")
    one_window = ((config.get("efficient_attention_config") or {}).get("swa") or {}).get("window_size")
    windows = [one_window] * len(types) if config.get("windows") is None else config["windows"]
    if len(windows) != len(types):
        raise UserError(f"{where}: windows has {len(windows)} entries but layer_types has {len(types)}")
    if any(kind == "swa" and window is None for kind, window in zip(types, windows, strict=True)):
        raise UserError(f"{where}: efficient_attention_config.swa.window_size is missing, and there are swa layers")
    return tuple(f"swa:{window}" if kind == "swa" else str(kind) for kind, window in zip(types, windows, strict=True))


def _plain_plan(config: dict[str, Any], types: list[str] | None, num_layers: int, where: str) -> LayerPlan:
    """Plain models: full attention, except where Qwen2 and Qwen3 switch on their sliding window.

    As transformers reads these keys: `use_sliding_window` is the gate of the window, `layer_types` says which layers
    have it, and else the first `max_window_layers` have none. Llama's code looks at none of them.
    """
    known = ("full_attention", "sliding_attention")
    for kind in types or ():
        if kind not in known:
            raise UserError(f"{where}: layer_types has '{kind}'; known here: {', '.join(known)}")
    if not FAMILIES[config["model_type"]].windows:
        return ("attn",) * (num_layers if types is None else len(types))
    window = config.get("sliding_window", DEFAULT_WINDOW) if config.get("use_sliding_window") else None
    if types is None:
        first = config.get("max_window_layers", DEFAULT_FIRST_WINDOW) if window else num_layers
        return tuple(f"swa:{window}" if layer >= first else "attn" for layer in range(num_layers))
    if window is None and known[1] in types:
        closed = "sliding_window is null" if config.get("use_sliding_window") else "use_sliding_window is not true"
        raise UserError(f"{where}: layer_types has '{known[1]}' but {closed}; transformers cannot run this either")
    return tuple(f"swa:{window}" if kind == known[1] else "attn" for kind in types)


def _mixers(config: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Settings of the linear mixers. Keys that only choose an implementation are dropped, others must be known."""
    mixers = {}
    for kind, settings in (config.get("efficient_attention_config") or {}).items():
        if kind in LINEAR_MIXERS:
            known = mixer_config_class(kind).model_fields
            ignored = {*_published_extras(kind), "mode"}
            unknown = sorted(set(settings) - set(known) - ignored)
            if unknown:
                raise UserError(f"{where}: efficient_attention_config.{kind}.{unknown[0]} is not known")
            mixers[kind] = _exact({key: value for key, value in settings.items() if key in known})
    return mixers


def _key_value_heads(config: dict[str, Any], hybrid: bool, heads: int) -> int:
    """Null means one per query head. Without the key hybrids have the published default."""
    missing = PUBLISHED_KEY_VALUE_HEADS if hybrid else None
    return config.get("num_key_value_heads", missing) or heads


def _default_head_dim(model_type: str, hidden: int, heads: int) -> int:
    family = FAMILIES.get(model_type)
    return hidden // heads if family is None or family.default_head_dim is None else family.default_head_dim


def _flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else value


def _required(config: dict[str, Any], key: str, where: str) -> int:
    if config.get(key) is None:
        raise UserError(f"{where}: {key} is missing")
    return config[key]
