"""Hybrid causal language models: Qwen2 with a mixer per layer (softmax attention, a window of it, or linear attention).

B = batch rows, T = tokens per row, V = vocabulary
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .attention import Attention, RMSNorm, rotary_angles
from .cache import CacheLayer, HybridCache
from .configuration_megatron_jet import JetNemotronConfig, MegatronJetConfig
from .delta_rule_mixer import DeltaRuleMixer
from .gated_delta_net import GatedDeltaNet, ShortConv1d
from .gla import GatedLinearAttention
from .jet_block import GeneratorLinear, JetBlock
from .token_layout import TokenLayout

# Older transformers (seen in 5.6 to 5.10) copy from a local directory only what this very file imports. So it names
# every file that the ones above need.
# isort: split
from .dynamic_conv import dynamic_causal_conv  # noqa: F401
from .flash_attention import flash_attend  # noqa: F401
from .gated_delta_rule import chunk_gated_delta_rule  # noqa: F401
from .gla_recurrence import chunk_gla  # noqa: F401
from .linear_mixer import LinearMixer  # noqa: F401
from .norm_gate import rms_norm_gated  # noqa: F401
from .recurrence import gated_delta_rule  # noqa: F401
from .short_conv import causal_conv  # noqa: F401
from .softmax_attention import attend  # noqa: F401

logger = logging.get_logger(__name__)

# Deviation of the taps that a fresh kernel generator gives (its bias), whatever the config's initializer_range.
STATIC_TAP_STD = 0.02

# What outputs and `generate` call the decoding cache (past_key_values before transformers 5.24). Inputs may use both.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

NO_CACHE_WITH_CHECKPOINTING = (
    "a decoding cache does not go with gradient checkpointing in training mode: call model.eval() or leave it out"
)

MIXERS = {
    "attn": Attention,
    "swa": Attention,
    "jet": JetBlock,
    "gated_delta_net": GatedDeltaNet,
    "gla": GatedLinearAttention,
}


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: JetNemotronConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class HybridDecoderLayer(GradientCheckpointingLayer):
    """Mixer and MLP, each behind an RMSNorm and beside a residual connection."""

    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__()
        # "self_attn" whatever the mixer: the published name.
        self.self_attn = MIXERS[config.layer_types[layer]](config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        layout: TokenLayout,
        rotary: tuple[torch.Tensor, ...],
        cache: CacheLayer | None = None,
    ) -> torch.Tensor:
        layout = layout.on(hidden.device)  # accelerate moves tensors between devices, and no other objects
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), layout, rotary, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class HybridPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = JetNemotronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True  # assisted generation would have to undo tokens
    # The decay is an exponential of an exponential of these: bf16 would move it.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights and zero biases but for norms, decay and JetBlock's generator; values already loaded stay.

        The generator starts as the published block does: both weights zero, so a static convolution. Note that
        neither weight gets a gradient from there; training from scratch has to draw one of them.
        """
        if isinstance(module, GeneratorLinear):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.normal_(module.bias, 0.0, STATIC_TAP_STD)
        elif isinstance(module, ShortConv1d):
            init.normal_(module.weight, 0.0, self.config.initializer_range)
        elif isinstance(module, DeltaRuleMixer):
            module.init_decay()
        else:
            super()._init_weights(module)


class HybridModel(HybridPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: JetNemotronConfig) -> None:
        super().__init__(config)
        config.check_rope_scaling()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _padding_row(config))
        self.layers = nn.ModuleList(HybridDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: HybridCache | None = None,
    ) -> BaseModelOutputWithPast:
        """Runs the layers.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, hidden].
            attention_mask: [B, past + T] or [B, T], 0 for padding anywhere in a row.
            position_ids: [B or 1, T]. Where they do not go up by one (over padding, by one or its width), a new
                document starts, and no token sees another document. By default padding is left out of the count.
            past_key_values: a `HybridCache`, extended in place.
            use_cache: make a cache where none is given; by default as the config says, never in training.
            output_hidden_states: also return the input of each layer and the final norm's output.
            output_attentions: not supported.
            cache: the name of past_key_values in newer transformers.

        Returns:
            The final norm's output; at padding it repeats that of the last real token before it, also of an earlier
            pass into the cache, so that the last column is the one to continue from whichever side the padding is on.

        Raises:
            ValueError: inputs that do not fit together, or another kind of cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("attention weights are not available: linear layers have none")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(_one_of(past_key_values, cache), use_cache)
        layout = TokenLayout.build(
            hidden.shape[:2],
            hidden.device,
            attention_mask,
            position_ids,
            start=0 if cache is None else cache.seen,
            starts=None if cache is None else cache.lengths,
        )
        rotary = rotary_angles(self.config, layout.positions, hidden.dtype)
        inputs = []
        for index, layer in enumerate(self.layers):
            inputs.append(hidden)
            hidden = layer(hidden, layout, rotary, None if cache is None else cache.layers[index])
        hidden = self.norm(hidden)
        if cache is None:
            hidden = layout.on(hidden.device).repeat_last_real(hidden)
        else:
            hidden = cache.advance(layout, hidden)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=(*inputs, hidden) if wanted else None,
            **{CACHE_NAME: cache},
        )

    @property
    def checkpoints_gradients(self) -> bool:
        """Whether passes are computed a second time for gradients, so that nothing may be stored on the way."""
        return self.gradient_checkpointing and self.training

    def _cache(self, given: HybridCache | None, use_cache: bool | None) -> HybridCache | None:
        if given is not None and not isinstance(given, HybridCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}, this model needs its own HybridCache(config)"
            )
        if self.checkpoints_gradients:
            if given is not None:
                raise ValueError(NO_CACHE_WITH_CHECKPOINTING)  # what it holds would be left out
            if use_cache:
                logger.warning_once("A cache does not go with gradient checkpointing: running without one.")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if given is None and use_cache:
            return HybridCache(self.config)
        return given


def _one_of(past_key_values: HybridCache | None, cache: HybridCache | None) -> HybridCache | None:
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("past_key_values and cache are two names of one thing; give one of them")
    return past_key_values if cache is None else cache


def _padding_row(config: JetNemotronConfig) -> int | None:
    """Row of the embedding that gets no gradient, as in the published model; None where the token has no row."""
    token = config.pad_token_id
    return token if token is not None and 0 <= token < config.vocab_size else None


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The model with its language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: JetNemotronConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: HybridCache | None = None,
        **loss_kwargs,
    ) -> CausalLMOutputWithPast:
        """See `HybridModel.forward`.

        Args:
            labels: [B, T], shifted here; -100 is left out of the loss.
            logits_to_keep: how many last tokens need logits (0: all), or which.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=_one_of(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # [B, T, V]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _prepare_position_ids_for_generation(self, *args, **kwargs) -> None:
        """The model counts by itself, past padding on either side; `generate` would count padding on the right."""
        return

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """`generate` gets this model's own cache."""
        given = model_kwargs.get(CACHE_NAME) is not None
        if self.model.checkpoints_gradients:
            if given:
                raise ValueError(NO_CACHE_WITH_CHECKPOINTING)
            # Without a cache `generate` must hand over the whole text each time: it does where it is told so here.
            generation_config.use_cache = model_kwargs["use_cache"] = False
        if not generation_config.use_cache or given:
            return
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not fit a model with "
                "recurrent states; leave it out"
            )
        model_kwargs[CACHE_NAME] = HybridCache(self.config, generation_config.max_length)


class JetNemotronModel(HybridModel):
    """`model_type: jet_nemotron` without the head, for `AutoModel`."""

    config_class = JetNemotronConfig


class MegatronJetModel(HybridModel):
    """`model_type: megatron_jet` without the head, for `AutoModel`."""

    config_class = MegatronJetConfig


class JetNemotronForCausalLM(HybridForCausalLM):
    """`model_type: jet_nemotron`, the published format."""

    config_class = JetNemotronConfig


class MegatronJetForCausalLM(HybridForCausalLM):
    """`model_type: megatron_jet`, the superset."""

    config_class = MegatronJetConfig


__all__ = ["JetNemotronForCausalLM", "JetNemotronModel", "MegatronJetForCausalLM", "MegatronJetModel"]
