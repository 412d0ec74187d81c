"""Softmax attention: full and sliding window. Sizes come from the model, only the window is the layer's own."""

from typing import ClassVar

from pydantic import Field

from megatron_jet.configs.mixers.base import DEFAULT_PRECISION, MixerConfig, ModelShape, Precision


def attention_params(shape: ModelShape) -> int:
    """Parameters of grouped-query attention: Q, K, V (with bias if the model has it), O, QK norms."""
    q_size = shape.num_attention_heads * shape.head_dim
    kv_size = shape.num_key_value_heads * shape.head_dim
    bias = q_size + 2 * kv_size if shape.qkv_bias else 0
    norms = 2 * shape.head_dim if shape.qk_norm else 0
    return 2 * shape.hidden_size * (q_size + kv_size) + bias + norms


def attention_tensors(shape: ModelShape) -> tuple[str, ...]:
    """Names of the parameters of grouped-query attention."""
    bias = ("linear_qkv.bias",) if shape.qkv_bias else ()
    norms = ("q_layernorm.weight", "k_layernorm.weight") if shape.qk_norm else ()
    return ("linear_qkv.weight", "linear_proj.weight", *bias, *norms)


def attention_flops(shape: ModelShape, visible: float) -> float:
    """Forward FLOPs per token when a query sees `visible` keys."""
    q_size = shape.num_attention_heads * shape.head_dim
    kv_size = shape.num_key_value_heads * shape.head_dim
    return 4.0 * shape.hidden_size * (q_size + kv_size) + 4.0 * q_size * visible


class AttentionConfig(MixerConfig):
    """Full causal softmax attention ("attn")."""

    kind: ClassVar[str] = "attn"
    is_softmax: ClassVar[bool] = True

    def tensor_names(self, shape: ModelShape) -> tuple[str, ...]:
        return attention_tensors(shape)

    def num_params(self, shape: ModelShape) -> int:
        return attention_params(shape)

    def flops_per_token(self, shape: ModelShape, context: int) -> float:
        return attention_flops(shape, (context + 1) / 2)  # the mean over the positions of a causal sequence

    def cache_bytes(self, shape: ModelShape, context: int, precision: Precision = DEFAULT_PRECISION) -> int:
        return 2 * shape.num_key_value_heads * shape.head_dim * context * precision.kv_bytes

    def shardable_heads(self, shape: ModelShape) -> tuple[int, ...]:
        return (shape.num_attention_heads, shape.num_key_value_heads)


class SlidingWindowConfig(MixerConfig):
    """Sliding-window attention ("swa:W"): key j is visible from query i iff i - window < j <= i."""

    kind: ClassVar[str] = "swa"
    is_softmax: ClassVar[bool] = True
    window: int = Field(gt=0, description="tokens a query sees, itself included")

    def tensor_names(self, shape: ModelShape) -> tuple[str, ...]:
        return attention_tensors(shape)

    def num_params(self, shape: ModelShape) -> int:
        return attention_params(shape)

    def flops_per_token(self, shape: ModelShape, context: int) -> float:
        window = min(self.window, context)
        # The first `window` positions see 1, 2, ... window keys, the others see `window`.
        visible = window - window * (window - 1) / 2 / context
        return attention_flops(shape, visible)

    def cache_bytes(self, shape: ModelShape, context: int, precision: Precision = DEFAULT_PRECISION) -> int:
        kept = min(self.window, context)
        return 2 * shape.num_key_value_heads * shape.head_dim * kept * precision.kv_bytes

    def shardable_heads(self, shape: ModelShape) -> tuple[int, ...]:
        return (shape.num_attention_heads, shape.num_key_value_heads)
