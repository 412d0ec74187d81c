"""Gated linear attention (arXiv 2312.06635), parameterised as in flash-linear-attention."""

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.nn import functional as F

from jet_kernels import dispatch
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.delta_rule import copy_teacher
from megatron_jet.mixers.linear import LinearMixer, linear_submodules
from megatron_jet.mixers.params import AttentionWeights, ParamRow, draw


class GLA(LinearMixer):
    """S <- Diag(exp(gk)) S + k v^T, read with q; gk = log sigmoid(W2 W1 h + b) / gate_logit_normalizer per channel."""

    def __init__(self, config, submodules, mixer: GLAConfig, *, pg_collection, **_):
        super().__init__(
            config,
            submodules,
            sections=section_widths(mixer),
            value_dim=mixer.value_dim,
            head_v_dim=mixer.head_v_dim,
            norm_eps=mixer.norm_eps,
            pg_collection=pg_collection,
        )
        self.mixer = mixer
        self.gk_down = self.make_parameter((mixer.gate_low_rank_dim, config.hidden_size))
        self.gk_down.sequence_parallel = config.sequence_parallel  # see LinearMixer.low_rank
        self.add_sharded("gk_up", (mixer.key_dim, mixer.gate_low_rank_dim))
        self.add_sharded("gk_bias", (mixer.key_dim,))

    def mix(self, hidden_states: Tensor, parts: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
        """See LinearMixer.mix."""
        width = self.mixer.head_dim
        logits = F.linear(self.low_rank(hidden_states, self.gk_down), self.gk_up, self.gk_bias)
        gk = F.logsigmoid(self.heads(logits, width).float()) / self.mixer.gate_logit_normalizer
        q, k = (self.heads(parts[name], width) for name in ("query", "key"))
        v = self.heads(parts["value"], self.mixer.head_v_dim)
        o, _ = dispatch.chunk_gla(q, k, v, gk, scale=width**-0.5, cu_seqlens=cu_seqlens)
        return o


def section_widths(mixer: GLAConfig) -> dict[str, int]:
    """Full widths of the input projection's sections."""
    return {"query": mixer.key_dim, "key": mixer.key_dim, "value": mixer.value_dim, "gate": mixer.value_dim}


def spec(config: GLAConfig, model: ModelConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Spec of a GLA layer."""
    return ModuleSpec(module=GLA, params={"mixer": config}, submodules=linear_submodules(backend))


def hf_rows(config: GLAConfig, model: ModelConfig) -> list[ParamRow]:
    """Rows relative to `self_attention.` and `self_attn.`."""
    h, rank, keys = model.hidden_size, config.gate_low_rank_dim, config.key_dim
    names = ("q_proj", "k_proj", "v_proj", "g_proj")
    rows = [
        ParamRow(f"in_proj.weight.{section}", (f"{name}.weight",), ((width, h),))
        for (section, width), name in zip(section_widths(config).items(), names, strict=True)
    ]
    return [
        *rows,
        ParamRow("out_proj.weight", ("o_proj.weight",), ((h, config.value_dim),)),
        ParamRow("o_norm.weight", ("o_norm.weight",), ((config.head_v_dim,),)),
        ParamRow("gk_down", ("gk_proj.0.weight",), ((rank, h),)),
        ParamRow("gk_up", ("gk_proj.1.weight",), ((keys, rank),)),
        ParamRow("gk_bias", ("gk_proj.1.bias",), ((keys,),)),
    ]


def init_random(config: GLAConfig, model: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Full tensors by Hugging Face name: matrices N(0, initializer_range), gate bias zero, norm one."""
    tensors = {}
    for row in hf_rows(config, model):
        shape = row.shapes[0]
        tensors[row.hf[0]] = draw(shape, model.initializer_range, generator) if len(shape) == 2 else torch.zeros(shape)
    tensors["o_norm.weight"] = torch.ones(config.head_v_dim)
    return tensors


def init_from_teacher(
    config: GLAConfig, model: ModelConfig, teacher: AttentionWeights, generator: torch.Generator
) -> dict[str, Tensor]:
    """`init_random` with Q, K, V and O taken from a softmax layer where the heads match."""
    tensors = init_random(config, model, generator)
    copy_teacher(config, tensors, teacher)
    return tensors
