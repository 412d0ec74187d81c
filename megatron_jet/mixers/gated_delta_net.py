"""Gated DeltaNet (arXiv 2412.06464): the gated delta rule with static short convolutions on q, k and v."""

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from jet_kernels import dispatch
from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.delta_rule import DeltaRuleMixer, copy_teacher, delta_rule_rows, delta_rule_start
from megatron_jet.mixers.linear import linear_submodules
from megatron_jet.mixers.params import AttentionWeights, ParamRow


class GatedDeltaNet(DeltaRuleMixer):
    """q, k and v each pass a causal depthwise convolution and SiLU. Weights are kept as torch's Conv1d has them."""

    def __init__(self, config, submodules, mixer: GatedDeltaNetConfig, **kwargs):
        super().__init__(config, submodules, mixer, **kwargs)
        for name, width in conv_widths(mixer).items():
            self.add_sharded(f"{name}_conv1d", (width, 1, mixer.conv_size))

    def mix(self, hidden_states: Tensor, parts: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
        """See LinearMixer.mix."""
        q, k, v = (
            dispatch.causal_conv(parts[section], weight[:, 0], cu_seqlens=cu_seqlens, activation="silu")[0]
            for section, weight in (("query", self.q_conv1d), ("key", self.k_conv1d), ("value", self.v_conv1d))
        )
        return self.delta_rule(q, k, v, parts, cu_seqlens)


def conv_widths(mixer: GatedDeltaNetConfig) -> dict[str, int]:
    """Channels of the three convolutions."""
    return {"q": mixer.key_dim, "k": mixer.key_dim, "v": mixer.value_dim}


def spec(config: GatedDeltaNetConfig, model: ModelConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Spec of a Gated DeltaNet layer."""
    return ModuleSpec(module=GatedDeltaNet, params={"mixer": config}, submodules=linear_submodules(backend))


def hf_rows(config: GatedDeltaNetConfig, model: ModelConfig) -> list[ParamRow]:
    """Rows relative to `self_attention.` and `self_attn.`; the Hugging Face names are flash-linear-attention's."""
    convs = [
        ParamRow(f"{name}_conv1d", (f"{name}_conv1d.weight",), ((width, 1, config.conv_size),))
        for name, width in conv_widths(config).items()
    ]
    return delta_rule_rows(config, model) + convs


def init_random(config: GatedDeltaNetConfig, model: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Full tensors by Hugging Face name; convolutions as torch's Conv1d starts them, U(-1, 1) / sqrt(conv_size)."""
    tensors = delta_rule_start(config, model, generator)
    bound = config.conv_size**-0.5
    for name, width in conv_widths(config).items():
        weight = torch.empty(width, 1, config.conv_size)
        tensors[f"{name}_conv1d.weight"] = weight.uniform_(-bound, bound, generator=generator)
    return tensors


def init_from_teacher(
    config: GatedDeltaNetConfig, model: ModelConfig, teacher: AttentionWeights, generator: torch.Generator
) -> dict[str, Tensor]:
    """`init_random` with Q, K, V and O taken from a softmax layer where the heads match.

    The convolutions start near the identity, so that queries, keys and values arrive as the teacher made them.
    """
    tensors = init_random(config, model, generator)
    copy_teacher(config, tensors, teacher)
    for name in "qkv":
        weight = tensors[f"{name}_conv1d.weight"]
        weight.normal_(0.0, model.initializer_range, generator=generator)
        weight[..., -1] += 1.0
    return tensors
