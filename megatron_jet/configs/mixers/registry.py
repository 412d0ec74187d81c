"""The list of mixers. Adding one: its config file, its module in megatron_jet/mixers, its HF file, one line below."""

from collections.abc import Mapping
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.attention import AttentionConfig, SlidingWindowConfig
from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.mixers.jet_block import JetBlockConfig

MIXER_CONFIGS: dict[str, type[MixerConfig]] = {
    cls.kind: cls for cls in (AttentionConfig, SlidingWindowConfig, JetBlockConfig, GatedDeltaNetConfig, GLAConfig)
}
LINEAR_MIXERS: tuple[str, ...] = tuple(kind for kind, cls in MIXER_CONFIGS.items() if not cls.is_softmax)


def mixer_config_class(kind: str) -> type[MixerConfig]:
    """Config class of a mixer name. Raises UserError that lists the known names."""
    if kind not in MIXER_CONFIGS:
        raise UserError(f"unknown mixer '{kind}'; known: {', '.join(MIXER_CONFIGS)}")
    return MIXER_CONFIGS[kind]


def typed_mixers(settings: Mapping[str, Any]) -> dict[str, MixerConfig]:
    """Configs of the linear mixers by name, from plain mappings (YAML, JSON) or configs.

    Raises:
        UserError: a name that is not a linear mixer, or settings that its config refuses.
    """
    if not isinstance(settings, Mapping):
        raise UserError("mixers: write a mapping from names to settings")
    typed = {}
    for kind, values in dict(settings).items():
        if kind not in LINEAR_MIXERS:
            raise UserError(f"mixers.{kind}: not a linear mixer; known: {', '.join(LINEAR_MIXERS)}")
        config_class = MIXER_CONFIGS[kind]
        typed[kind] = values if isinstance(values, config_class) else config_class.parse(values, f"mixers.{kind}")
    return typed
