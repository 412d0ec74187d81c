"""JetBlock (Jet-Nemotron paper, section 3.2; the published code decides where the two differ)."""

from typing import ClassVar

from pydantic import Field

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.base import DEFAULT_PRECISION, ModelShape, Precision
from megatron_jet.configs.mixers.delta_rule import DeltaRuleConfig


class JetBlockConfig(DeltaRuleConfig):
    """Gated delta rule whose values pass a convolution with one kernel per token and channel."""

    kind: ClassVar[str] = "jet"
    dconv_generator_reduction: int = Field(default=8, gt=0)
    static_kernel: bool = Field(default=False, description="ablation: freeze the kernel generator at its static start")

    @property
    def generator_dim(self) -> int:
        """Width of the kernel generator's hidden layer."""
        return self.value_dim // self.dconv_generator_reduction

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        if self.generator_dim < 1:
            raise UserError(
                f"jet: dconv_generator_reduction={self.dconv_generator_reduction} is larger than "
                f"d_v*heads={self.value_dim}"
            )

    def tensor_names(self, shape: ModelShape) -> tuple[str, ...]:
        return (*super().tensor_names(shape), "kernel_w1", "kernel_w2", "kernel_bias")

    def num_params(self, shape: ModelShape) -> int:
        generator = shape.hidden_size * self.generator_dim
        kernels = self.value_dim * self.conv_size
        return self.projection_params(shape) + generator + self.generator_dim * kernels + kernels

    def flops_per_token(self, shape: ModelShape, context: int) -> float:
        convolution = 2.0 * self.value_dim * self.conv_size
        return 2.0 * self.num_params(shape) + convolution + self.recurrence_flops()

    def cache_bytes(self, shape: ModelShape, context: int, precision: Precision = DEFAULT_PRECISION) -> int:
        return self.state_bytes(precision)

    def conv_state_bytes(self, shape: ModelShape, precision: Precision = DEFAULT_PRECISION) -> int:
        return (self.conv_size - 1) * self.value_dim * precision.kv_bytes
