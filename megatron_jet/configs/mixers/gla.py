"""Gated linear attention (arXiv 2312.06635), parameterised as in flash-linear-attention."""

from typing import ClassVar

from pydantic import Field

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.mixers.base import DEFAULT_PRECISION, MixerConfig, ModelShape, Precision


class GLAConfig(MixerConfig):
    """S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T with alpha = sigmoid(low-rank projection) ^ (1 / normalizer)."""

    kind: ClassVar[str] = "gla"
    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, description="d_k")
    expand_v: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="d_v / d_k")
    norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    gate_low_rank_dim: int = Field(default=16, gt=0)
    gate_logit_normalizer: float = Field(default=16.0, gt=0, allow_inf_nan=False)

    @property
    def head_v_dim(self) -> int:
        """d_v. Raises UserError when expand_v * head_dim is not a whole number (relative error above 1e-5)."""
        exact = self.head_dim * self.expand_v
        nearest = round(exact)
        if nearest < 1 or abs(exact - nearest) > 1e-5 * exact:
            raise UserError(f"gla: expand_v={self.expand_v} times head_dim={self.head_dim} is not a whole d_v")
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
        return ("in_proj.weight", "out_proj.weight", "o_norm.weight", "gk_down", "gk_up", "gk_bias")

    def num_params(self, shape: ModelShape) -> int:
        projections = shape.hidden_size * (2 * self.key_dim + 3 * self.value_dim)
        gate = self.gate_low_rank_dim * (shape.hidden_size + self.key_dim) + self.key_dim
        return projections + gate + self.head_v_dim

    def flops_per_token(self, shape: ModelShape, context: int) -> float:
        # Decay, rank-one update and read-out: 5 operations per state element.
        return 2.0 * self.num_params(shape) + 5.0 * self.num_heads * self.head_dim * self.head_v_dim

    def cache_bytes(self, shape: ModelShape, context: int, precision: Precision = DEFAULT_PRECISION) -> int:
        return self.num_heads * self.head_dim * self.head_v_dim * precision.state_bytes
