"""Configurations of the hybrid models: the published `jet_nemotron` format and its superset `megatron_jet`."""

import json
import re
from typing import Any

import transformers

OLDEST_TORCH, OLDEST_TRANSFORMERS = "2.9", "5.6.2"
_found, _oldest = (re.findall(r"\d+", text)[:3] for text in (transformers.__version__, OLDEST_TRANSFORMERS))
if list(map(int, _found)) < list(map(int, _oldest)):
    # Before the other imports, which older releases answer with errors that do not say what to do.
    raise ImportError(
        f"this model's code needs transformers>={OLDEST_TRANSFORMERS}, {transformers.__version__} is installed: "
        f"pip install 'transformers>={OLDEST_TRANSFORMERS}'"
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import PretrainedConfig  # noqa: E402

SOFTMAX_MIXERS = ("attn", "swa")
ROPE_TYPES = ("default", "llama3")
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
DELTA_RULE_SETTINGS = {"num_heads": int, "head_dim": int, "expand_v": float, "norm_eps": float, "conv_size": int}
# Settings of each linear mixer with their types; the published files write norm_eps as the string "1e-5".
MIXER_SETTINGS = {
    "jet": {**DELTA_RULE_SETTINGS, "dconv_generator_reduction": int},
    "gated_delta_net": DELTA_RULE_SETTINGS,
    "gla": {
        "num_heads": int,
        "head_dim": int,
        "expand_v": float,
        "norm_eps": float,
        "gate_low_rank_dim": int,
        "gate_logit_normalizer": float,
    },
}
SETTING_DEFAULTS = {
    "expand_v": 2.0,
    "norm_eps": 1e-5,
    "conv_size": 4,
    "dconv_generator_reduction": 8,
    "gate_low_rank_dim": 16,
    "gate_logit_normalizer": 16.0,
}


def whole_head_v_dim(kind: str, head_dim: int, expand_v: float) -> int:
    """d_v of a value head. The published 2.6666666667 * 96 means 256: relative errors up to 1e-5 are rounding.

    Raises:
        ValueError: head_dim * expand_v is not a whole number.
    """
    exact = head_dim * expand_v
    nearest = round(exact)
    if nearest < 1 or abs(exact - nearest) > 1e-5 * exact:
        raise ValueError(f"{kind}: expand_v={expand_v} times head_dim={head_dim} is not a whole number")
    return nearest


@strict
class JetNemotronConfig(PretrainedConfig):
    """The published format (`model_type: jet_nemotron`): Qwen2 with a mixer per layer.

    Attributes:
        layer_types: mixer of each layer, "jet", "swa" or "attn", named as in the published config.json.
        efficient_attention_config: settings by mixer, {"jet": {...}, "swa": {"window_size": N}}.
        rope_scaling: none, or Llama 3's, {"rope_type": "llama3", "factor": ..., ...} as in its config.json.

    The other attributes are Qwen2's; their defaults are the published code's. Building one raises ValueError
    for a layer type, window or head count that no model can have.
    """

    model_type = "jet_nemotron"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # its name from transformers 5.24 on
    # No model is without layer types, so `JetNemotronConfig()` fails; transformers before 5.23 calls it for defaults.
    has_no_defaults_at_init = True
    known_mixers = ("jet", "swa", "attn")

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_theta: float | int = 1e6
    rope_scaling: dict | None = None
    attention_dropout: float | int = 0.0
    layer_types: list[str] | str | None = None
    efficient_attention_config: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if isinstance(self.layer_types, str):
            self.layer_types = self._parse_layer_types(self.layer_types)
        self._accept_rope_parameters(kwargs.pop("rope_parameters", None))
        super().__post_init__(**kwargs)

    @staticmethod
    def _parse_layer_types(text: str) -> list[str]:
        """Some copies of the published files hold the list as a string. It is parsed, never evaluated."""
        try:
            names = json.loads(text.replace("'", '"'))
        except json.JSONDecodeError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"layer_types {text!r} is not a list of mixer names")
        return names

    def _accept_rope_parameters(self, parameters: dict | None) -> None:
        """Files written by transformers 5 hold rope_theta inside rope_parameters."""
        if parameters:
            self.rope_theta = parameters.get("rope_theta", self.rope_theta)
            self.rope_scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}

    def validate_layer_type(self) -> None:
        """Checks the layer types against this format's names.

        transformers allows only its own names in an attribute called `layer_types` and leaves this
        hook to override, which keeps config.json as published.
        """
        kinds = self.layer_types
        if kinds is None:
            raise ValueError("layer_types is missing: name the mixer of each layer")
        unknown = sorted(set(kinds) - set(self.known_mixers))
        if unknown:
            raise ValueError(f"layer_types has {unknown[0]!r}; {self.model_type} knows {', '.join(self.known_mixers)}")
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(kinds)} entries for {self.num_hidden_layers} layers")
        for layer, kind in enumerate(kinds):
            if kind == "swa":
                self.window(layer)
            elif kind not in SOFTMAX_MIXERS:
                self.mixer_settings(kind)

    def validate_softmax_layers(self) -> None:
        """Checks what the softmax attention layers and the MLP need."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.softmax_head_dim % 2 or self.softmax_head_dim < 1:
            raise ValueError(f"head_dim={self.softmax_head_dim} is not even, as rotary embeddings need")
        self.check_rope_scaling()

    def check_rope_scaling(self) -> None:
        """Raises ValueError for a scaling that is not computed here, or that lacks a number.

        The model asks again: what `from_pretrained` is given as an argument is set after the config was checked.
        """
        scaling = self.rope_scaling or {}
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))  # older files say "type"
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_scaling={scaling} is not supported, only {', '.join(ROPE_TYPES)}")
        for name in LLAMA3_SCALING if rope_type == "llama3" else ():
            value = scaling.get(name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"rope_scaling.{name}={value!r} is not a positive number")

    @property
    def softmax_head_dim(self) -> int:
        """Width of a softmax attention head."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    def mixer_settings(self, kind: str) -> dict[str, Any]:
        """Settings of a linear mixer with their types and defaults, and its `head_v_dim`.

        Raises:
            ValueError: a setting is missing, has the wrong type or is not positive.
        """
        given = (self.efficient_attention_config or {}).get(kind)
        if given is None:
            raise ValueError(f"layer_types uses {kind!r} but efficient_attention_config has no {kind!r}")
        settings = {}
        for name, of_type in MIXER_SETTINGS[kind].items():
            value = given.get(name, SETTING_DEFAULTS.get(name))
            try:
                settings[name] = of_type(value)
            except (TypeError, ValueError):
                raise ValueError(f"efficient_attention_config.{kind}.{name}={value!r} is not a number") from None
            if settings[name] <= 0 or (of_type is int and settings[name] != float(value)):
                raise ValueError(
                    f"efficient_attention_config.{kind}.{name}={value!r} is not a positive {of_type.__name__}"
                )
        settings["head_v_dim"] = whole_head_v_dim(kind, settings["head_dim"], settings["expand_v"])
        return settings

    def window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None where the layer has no window.

        Raises:
            ValueError: the layer is "swa" and its window is missing or below 1.
        """
        if self.layer_types[layer] != "swa":
            return None
        window = self._given_window(layer)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ValueError(f"layer {layer} is 'swa' but its window is {window!r}, not a whole number above 0")
        return window

    def _given_window(self, layer: int) -> Any:
        return ((self.efficient_attention_config or {}).get("swa") or {}).get("window_size")


@strict
class MegatronJetConfig(JetNemotronConfig):
    """The superset (`model_type: megatron_jet`): more mixers, a window per layer, other base models.

    Attributes:
        layer_types: also "gated_delta_net" and "gla".
        windows: window of each layer (null where it has none), when "swa" layers differ.
        head_dim: width of a softmax head, when it is not hidden_size / num_attention_heads.
        qkv_bias: whether the softmax layers' Q, K and V projections have biases.
        qk_norm: whether the softmax layers normalise each query and key head (RMSNorm).
    """

    model_type = "megatron_jet"
    known_mixers = ("jet", "swa", "attn", "gated_delta_net", "gla")

    head_dim: int | None = None
    qkv_bias: bool = True
    qk_norm: bool = False
    windows: list[int | None] | None = None

    def validate_layer_type(self) -> None:
        """Checks that `windows` has one entry per layer, and then the layer types."""
        if self.windows is not None and len(self.windows) != self.num_hidden_layers:
            raise ValueError(f"windows has {len(self.windows)} entries for {self.num_hidden_layers} layers")
        super().validate_layer_type()

    def _given_window(self, layer: int) -> Any:
        return super()._given_window(layer) if self.windows is None else self.windows[layer]


__all__ = ["JetNemotronConfig", "MegatronJetConfig"]
