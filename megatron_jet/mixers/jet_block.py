"""JetBlock: the gated delta rule with a convolution on the values whose kernels come from the input (FACTS 2)."""

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional as F

from jet_kernels import dispatch
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.delta_rule import DeltaRuleMixer, copy_teacher, delta_rule_rows, delta_rule_start
from megatron_jet.mixers.linear import linear_submodules
from megatron_jet.mixers.params import AttentionWeights, ParamRow, draw

BIAS_STD = 0.02
GENERATOR = "dynamic_conv1d.kernel_generator."


class JetBlock(DeltaRuleMixer):
    """q, k with SiLU only, v through the dynamic convolution and SiLU.

    The kernel generator's first layer is narrow (value_dim / reduction) and replicated; the second makes the kernels of
    this rank's channels. Its rows are channel * conv_size + tap, so dividing them over heads keeps a channel's taps
    together.
    """

    def __init__(self, config, submodules, mixer: JetBlockConfig, **kwargs):
        super().__init__(config, submodules, mixer, **kwargs)
        taps = mixer.value_dim * mixer.conv_size
        self.kernel_w1 = self.make_parameter((mixer.generator_dim, config.hidden_size))
        self.kernel_w1.sequence_parallel = config.sequence_parallel  # see LinearMixer.low_rank
        self.add_sharded("kernel_w2", (taps, mixer.generator_dim))
        self.add_sharded("kernel_bias", (taps,))
        if mixer.static_kernel:
            self.kernel_w1.requires_grad = self.kernel_w2.requires_grad = False

    def mix(self, hidden_states: Tensor, parts: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
        """See LinearMixer.mix."""
        if self.mixer.static_kernel:
            kernel = self.kernel_bias.unflatten(0, (-1, self.mixer.conv_size))  # [channels, conv_size]
            v, _ = dispatch.causal_conv(parts["value"], kernel, cu_seqlens=cu_seqlens, activation="silu")
        else:
            hidden = F.silu(self.low_rank(hidden_states, self.kernel_w1))  # [b, s, generator_dim]
            v, _ = dispatch.fused_dynamic_conv(
                parts["value"], hidden, self.kernel_w2, self.kernel_bias, cu_seqlens=cu_seqlens, activation="silu"
            )
        return self.delta_rule(F.silu(parts["query"]), F.silu(parts["key"]), v, parts, cu_seqlens)


def spec(config: JetBlockConfig, model: ModelConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Spec of a JetBlock layer."""
    return ModuleSpec(module=JetBlock, params={"mixer": config}, submodules=linear_submodules(backend))


def hf_rows(config: JetBlockConfig, model: ModelConfig) -> list[ParamRow]:
    """Rows relative to `self_attention.` and `self_attn.`; the Hugging Face names are the published ones."""
    taps, rank = config.value_dim * config.conv_size, config.generator_dim
    return [
        *delta_rule_rows(config, model),
        ParamRow("kernel_w1", (f"{GENERATOR}w1.weight",), ((rank, model.hidden_size),)),
        ParamRow("kernel_w2", (f"{GENERATOR}w2.weight",), ((taps, rank),)),
        ParamRow("kernel_bias", (f"{GENERATOR}w2.bias",), ((taps,),)),
    ]


def init_random(config: JetBlockConfig, model: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Full tensors by Hugging Face name.

    The block starts as a static convolution with taps N(0, 0.02). The published code sets both weights of the
    kernel generator to zero, a point where neither gets a gradient; here only the second is zero, so the start is
    the same and the generator can learn.
    """
    tensors = delta_rule_start(config, model, generator)
    taps, narrow = config.value_dim * config.conv_size, (config.generator_dim, model.hidden_size)
    tensors[f"{GENERATOR}w1.weight"] = draw(narrow, model.initializer_range, generator)
    tensors[f"{GENERATOR}w2.weight"] = torch.zeros(taps, config.generator_dim)
    tensors[f"{GENERATOR}w2.bias"] = draw((taps,), BIAS_STD, generator)
    return tensors


def init_from_teacher(
    config: JetBlockConfig, model: ModelConfig, teacher: AttentionWeights, generator: torch.Generator
) -> dict[str, Tensor]:
    """`init_random` with Q, K, V and O taken from a softmax layer where the heads match.

    The tap of the current token gets 1 added, so that the values reach the output projection they were trained with.
    """
    tensors = init_random(config, model, generator)
    copy_teacher(config, tensors, teacher)
    tensors[f"{GENERATOR}w2.bias"].view(-1, config.conv_size)[:, -1] += 1.0
    return tensors
