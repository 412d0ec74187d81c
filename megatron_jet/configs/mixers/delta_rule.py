"""Sizes shared by the mixers built on the gated delta rule (JetBlock and Gated DeltaNet)."""

from pydantic import Field, field_validator

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.base import MixerConfig, ModelShape, Precision


class DeltaRuleConfig(MixerConfig):
    """Heads, key width and value expansion of a gated delta rule layer: d_k = head_dim, d_v = expand_v * d_k."""

    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, description="d_k, the width of a query and key head")
    expand_v: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="d_v / d_k")
    norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    conv_size: int = Field(default=4, ge=1, description="taps of the causal convolution, the current token included")

    @field_validator("norm_eps", mode="before")
    @classmethod
    def _eps_from_string(cls, value):
        """The published files write norm_eps as the string "1e-5"."""
        return float(value) if isinstance(value, str) else value

    @property
    def head_v_dim(self) -> int:
        """d_v. The published 2.6666666667 * 96 means 256, so a relative error of 1e-5 is rounded away.

        Raises:
            UserError: expand_v * head_dim is not a whole number.
        """
        exact = self.head_dim * self.expand_v
        nearest = round(exact)
        if nearest < 1 or abs(exact - nearest) > 1e-5 * exact:
            raise UserError(f"{self.kind}: expand_v={self.expand_v} times head_dim={self.head_dim} is not a whole d_v")
        return nearest

    @property
    def key_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.num_heads * self.head_v_dim

    def check(self, shape: ModelShape) -> None:
        _ = self.head_v_dim

    def shardable_heads(self, shape: ModelShape) -> tuple[int, ...]:
        return (self.num_heads,)

    def tensor_names(self, shape: ModelShape) -> tuple[str, ...]:
        return ("in_proj.weight", "out_proj.weight", "o_norm.weight", "A_log", "dt_bias")

    def projection_params(self, shape: ModelShape) -> int:
        """q, k, v, gate, output, the two per-head scalars a and b, A_log, dt_bias and the output norm."""
        projections = shape.hidden_size * (2 * self.key_dim + 3 * self.value_dim + 2 * self.num_heads)
        return projections + 2 * self.num_heads + self.head_v_dim

    def recurrence_flops(self) -> float:
        """Per token: decay, S^T k, rank-one update and S^T q, 7 operations per state element."""
        return 7.0 * self.num_heads * self.head_dim * self.head_v_dim

    def state_bytes(self, precision: Precision) -> int:
        return self.num_heads * self.head_dim * self.head_v_dim * precision.state_bytes
