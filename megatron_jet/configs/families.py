"""Teacher families: what their config.json leaves unsaid. A new one of this kind is one row here and a test fixture."""

from dataclasses import dataclass

from pydantic import Field, model_validator

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError


@dataclass(frozen=True)
class Family:
    """Traits of a Hugging Face model type.

    Attributes:
        architecture: class name in config.json.
        qkv_bias: Q, K and V projections have biases.
        qk_norm: every query and key head is normalised (RMSNorm).
        derives_head_dim: config.json has no head_dim; it is hidden_size / num_attention_heads.
        default_head_dim: without the key in config.json; None: hidden_size / num_attention_heads.
        windows: config.json can switch on sliding windows. The code of other families ignores those keys.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    derives_head_dim: bool = False
    default_head_dim: int | None = None
    windows: bool = False

    @property
    def traits(self) -> tuple[bool, bool]:
        """qkv_bias and qk_norm."""
        return self.qkv_bias, self.qk_norm


FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, derives_head_dim=True, windows=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, default_head_dim=128, windows=True),
    "llama": Family("LlamaForCausalLM"),
}


class RopeScaling(StrictModel):
    """Llama 3's stretching of rotary wavelengths beyond the length the model was first trained on.

    Wavelengths (tokens per turn) below original / high_freq_factor stay, those above original / low_freq_factor grow
    by `factor`, and those between go over smoothly. Source: Llama 3.1's reference code; the keys are config.json's.
    """

    # Strict: transformers refuses numbers written as text.
    factor: float = Field(ge=1, allow_inf_nan=False, strict=True)
    low_freq_factor: float = Field(gt=0, allow_inf_nan=False, strict=True)
    high_freq_factor: float = Field(gt=0, allow_inf_nan=False, strict=True)
    original_max_position_embeddings: int = Field(gt=0, strict=True)

    @model_validator(mode="after")
    def _ordered(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope_scaling: high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )
        return self
