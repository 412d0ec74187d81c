"""The model config: what HF's config.json and Megatron's TransformerConfig are both derived from."""

from typing import Any

from pydantic import Field, field_serializer, field_validator, model_validator

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.families import FAMILIES, RopeScaling
from megatron_jet.configs.layer_plan import LayerPlan, check_plan, split_entry
from megatron_jet.configs.mixers.attention import AttentionConfig, SlidingWindowConfig
from megatron_jet.configs.mixers.base import MixerConfig, ModelShape
from megatron_jet.configs.mixers.registry import typed_mixers


class ModelConfig(StrictModel):
    """A decoder-only model: SwiGLU MLPs, RMSNorm, RoPE, and one mixer per layer as the layer plan says."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(default=32768, gt=0)
    rope_theta: float = Field(default=1e6, gt=0, allow_inf_nan=False)
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    initializer_range: float = Field(default=0.02, gt=0)
    tie_word_embeddings: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    base_model_type: str = Field(default="qwen2", description="a family of configs/families.py")
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    layer_plan: LayerPlan
    mixers: dict[str, MixerConfig] = Field(default_factory=dict, description="parameters of the linear mixers by name")

    @field_validator("mixers", mode="before")
    @classmethod
    def _typed_mixers(cls, value: Any) -> dict[str, MixerConfig]:
        return typed_mixers(value)

    @field_serializer("mixers")
    def _plain_mixers(self, mixers: dict[str, MixerConfig]) -> dict[str, Any]:
        return {kind: mixer.to_dict() for kind, mixer in mixers.items()}

    @field_validator("base_model_type")
    @classmethod
    def _known_family(cls, value: str) -> str:
        if value not in FAMILIES:
            raise UserError(f"base_model_type '{value}' is not supported; known: {', '.join(FAMILIES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} does not divide by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is not even, as rotary embeddings need")
        check_plan(self.layer_plan, self.num_layers)
        for i in range(self.num_layers):
            self.mixer(i).check(self.shape)
        return self

    @property
    def shape(self) -> ModelShape:
        """The sizes that mixer costs depend on."""
        return ModelShape(
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.qkv_bias,
            self.qk_norm,
        )

    def mixer(self, layer: int) -> MixerConfig:
        """Config of a layer's mixer (0-based). Raises UserError when the plan names a mixer without parameters."""
        return self.mixer_of(self.layer_plan[layer])

    def mixer_of(self, entry: str) -> MixerConfig:
        """Config of a plan entry such as "attn", "swa:64" or "jet"."""
        kind, window = split_entry(entry)
        if kind == "attn":
            return AttentionConfig()
        if kind == "swa":
            return SlidingWindowConfig(window=window)
        if kind not in self.mixers:
            raise UserError(f"layer plan uses '{kind}' but mixers.{kind} is not given")
        return self.mixers[kind]

    def with_plan(self, plan: LayerPlan, mixers: dict[str, MixerConfig] | None = None) -> "ModelConfig":
        """The same model with another layer plan and, if given, other linear mixers."""
        return self.replace(layer_plan=tuple(plan), mixers=self.mixers if mixers is None else mixers)

    def check_parallel(self, tensor_parallel: int, pipeline_parallel: int = 1, virtual_pipeline: int = 1) -> None:
        """Raise one UserError when the model cannot be laid out at this TP and PP, with that many chunks per stage."""
        for i in range(self.num_layers):
            self.mixer(i).check_parallel(self.shape, tensor_parallel)
        for name in ("intermediate_size", "vocab_size"):
            if getattr(self, name) % tensor_parallel:
                raise UserError(f"{name}={getattr(self, name)} does not divide by tensor_parallel={tensor_parallel}")
        if self.num_layers % pipeline_parallel:
            raise UserError(f"num_layers={self.num_layers} does not divide by pipeline_parallel={pipeline_parallel}")
        if self.num_layers % (pipeline_parallel * virtual_pipeline):
            raise UserError(
                f"num_layers={self.num_layers} does not divide by pipeline_parallel*virtual_pipeline="
                f"{pipeline_parallel}*{virtual_pipeline}"
            )
