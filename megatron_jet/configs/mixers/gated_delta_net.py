"""Gated DeltaNet (arXiv 2412.06464) as flash-linear-attention builds it, with output gate and short convolutions."""

from typing import ClassVar

from megatron_jet.configs.mixers.base import DEFAULT_PRECISION, ModelShape, Precision
from megatron_jet.configs.mixers.delta_rule import DeltaRuleConfig


class GatedDeltaNetConfig(DeltaRuleConfig):
    """JetBlock's recurrence with static causal convolutions (SiLU) on q, k and v."""

    kind: ClassVar[str] = "gated_delta_net"

    @property
    def conv_dim(self) -> int:
        return 2 * self.key_dim + self.value_dim

    def tensor_names(self, shape: ModelShape) -> tuple[str, ...]:
        return (*super().tensor_names(shape), *(f"{name}_conv1d" for name in "qkv"))

    def num_params(self, shape: ModelShape) -> int:
        return self.projection_params(shape) + self.conv_dim * self.conv_size

    def flops_per_token(self, shape: ModelShape, context: int) -> float:
        return 2.0 * self.num_params(shape) + self.recurrence_flops()

    def cache_bytes(self, shape: ModelShape, context: int, precision: Precision = DEFAULT_PRECISION) -> int:
        return self.state_bytes(precision)

    def conv_state_bytes(self, shape: ModelShape, precision: Precision = DEFAULT_PRECISION) -> int:
        return (self.conv_size - 1) * self.conv_dim * precision.kv_bytes
