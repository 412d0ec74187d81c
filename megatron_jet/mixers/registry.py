"""The mixers by kind. Adding one: its config in configs/mixers, its module here, its HF file, one line below."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.mixers.registry import mixer_config_class
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers import attention, gated_delta_net, gla, jet_block
from megatron_jet.mixers.params import AttentionWeights, ParamRow


@dataclass(frozen=True)
class MixerDefinition:
    """What a mixer offers to the rest of the project.

    Attributes:
        spec: Megatron spec of one layer's mixer.
        hf_rows: its tensors, relative to `self_attention.` and `self_attn.`.
        init_random: full tensors by Hugging Face name for a model trained from scratch.
        init_from_teacher: the same, started from a softmax layer's Q, K, V and O.
    """

    spec: Callable[[MixerConfig, ModelConfig, BackendSpecProvider], ModuleSpec]
    hf_rows: Callable[[MixerConfig, ModelConfig], list[ParamRow]]
    init_random: Callable[[MixerConfig, ModelConfig, torch.Generator], dict[str, Tensor]]
    init_from_teacher: Callable[[MixerConfig, ModelConfig, AttentionWeights, torch.Generator], dict[str, Tensor]]


def _definition(module) -> MixerDefinition:
    return MixerDefinition(module.spec, module.hf_rows, module.init_random, module.init_from_teacher)


MIXERS: dict[str, MixerDefinition] = {
    "attn": _definition(attention),
    "swa": _definition(attention),
    "jet": _definition(jet_block),
    "gated_delta_net": _definition(gated_delta_net),
    "gla": _definition(gla),
}


def mixer_definition(kind: str) -> MixerDefinition:
    """Definition of a mixer. Raises UserError that lists the known names."""
    mixer_config_class(kind)
    return MIXERS[kind]
