"""Softmax attention, full or sliding window per layer, on Megatron's SelfAttention."""

import copy

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.params import AttentionWeights, ParamRow, draw


class WindowedSelfAttention(SelfAttention):
    """SelfAttention with its own window, and optionally more windows over the same weights.

    Megatron knows one window per model. Here every layer gets a copy of the config with its own, which both Transformer
    Engine's core attention and ours read.

    Args:
        window: tokens a query sees, itself included; None for full attention.
        more_windows: further windows that `forward(..., window=W)` may ask for (a search evaluates them untrained).
    """

    def __init__(
        self,
        config,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        window: int | None = None,
        more_windows: tuple[int, ...] = (),
        **kwargs,
    ):
        super().__init__(_with_window(config, window), submodules, layer_number, **kwargs)
        self.window = window
        self.more_cores = torch.nn.ModuleDict()
        for extra in more_windows:
            self.more_cores[str(extra)] = submodules.core_attention(
                config=_with_window(config, extra),
                layer_number=layer_number,
                attn_mask_type=self.attn_mask_type,
                attention_type="self",
                cp_comm_type=None,
                softmax_scale=config.softmax_scale,
                pg_collection=self.pg_collection,
            )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, window: int | None = None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """See SelfAttention; `window` picks one of `more_windows` for this call."""
        if window is None or window == self.window:
            return super().forward(hidden_states, attention_mask, **kwargs)
        own = self.core_attention
        self.core_attention = self.more_cores[str(window)]
        try:
            return super().forward(hidden_states, attention_mask, **kwargs)
        finally:
            self.core_attention = own

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Core attentions have no weights; leaving the extra ones out keeps checkpoints independent of them."""
        more_cores, self.more_cores = self.more_cores, torch.nn.ModuleDict()
        try:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        finally:
            self.more_cores = more_cores


def _with_window(config, window: int | None):
    config = copy.copy(config)
    config.window_size = None if window is None else (window - 1, 0)
    config.window_attn_skip_freq = None
    return config


def spec(
    config: MixerConfig, model: ModelConfig, backend: BackendSpecProvider, more_windows: tuple[int, ...] = ()
) -> ModuleSpec:
    """Spec of a full ("attn") or sliding-window ("swa") layer."""
    norm = backend.layer_norm(rms_norm=True, for_qk=True) if model.qk_norm else IdentityOp
    return ModuleSpec(
        module=WindowedSelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "window": getattr(config, "window", None),
            "more_windows": more_windows,
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def hf_rows(config: MixerConfig, model: ModelConfig) -> list[ParamRow]:
    """Rows relative to `self_attention.` and `self_attn.`."""
    q_size, kv_size, h = _sizes(model)
    names = tuple(f"{name}_proj.weight" for name in "qkv")
    rows = [
        ParamRow("linear_qkv.weight", names, ((q_size, h), (kv_size, h), (kv_size, h)), "qkv"),
        ParamRow("linear_proj.weight", ("o_proj.weight",), ((h, q_size),)),
    ]
    if model.qkv_bias:
        names = tuple(f"{name}_proj.bias" for name in "qkv")
        rows.append(ParamRow("linear_qkv.bias", names, ((q_size,), (kv_size,), (kv_size,)), "qkv"))
    if model.qk_norm:
        for name in "qk":
            rows.append(ParamRow(f"{name}_layernorm.weight", (f"{name}_norm.weight",), ((model.head_dim,),)))
    return rows


def init_random(config: MixerConfig, model: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Full tensors by Hugging Face name: N(0, initializer_range), biases zero, norms one."""
    tensors = {}
    for row in hf_rows(config, model):
        for name, shape in zip(row.hf, row.shapes, strict=True):
            if name.endswith("norm.weight"):
                tensors[name] = torch.ones(shape)
            elif name.endswith(".bias"):
                tensors[name] = torch.zeros(shape)
            else:
                tensors[name] = draw(shape, model.initializer_range, generator)
    return tensors


def init_from_teacher(
    config: MixerConfig, model: ModelConfig, teacher: AttentionWeights, generator: torch.Generator
) -> dict[str, Tensor]:
    """A softmax layer is the teacher's own; biases and norms are loaded with it, not derived from Q, K, V, O."""
    raise NotImplementedError("softmax layers take over the teacher's tensors as they are")


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    return model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim, model.hidden_size
