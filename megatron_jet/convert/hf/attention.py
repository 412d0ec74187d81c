"""Softmax attention layers: full, and over a sliding window (Qwen2's, with optional QK norm)."""

import math

import torch
from torch import nn

from .cache import KeyValueLayer
from .configuration_megatron_jet import JetNemotronConfig
from .softmax_attention import attend
from .token_layout import TokenLayout


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, normalised in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rotary_angles(config: JetNemotronConfig, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Cosines and sines of the rotary embedding.

    Args:
        config: gives rope_theta, rope_scaling and the head width D.
        positions: [B, T].
        dtype: of the result; the angles are computed in fp32 (fp64 for fp64 models).

    Returns:
        Two tensors [B, 1, T, D].
    """
    dim = config.softmax_head_dim
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=angle_dtype) / dim
    periods = config.rope_theta**exponents  # tokens per radian, [D / 2]
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type")) == "llama3":
        periods = stretch(periods, scaling)
    angles = positions[:, None, :, None].to(angle_dtype) / periods
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def stretch(periods: torch.Tensor, scaling: dict) -> torch.Tensor:
    """Llama 3's scaling: long periods grow by `factor`, short ones stay, those between go over smoothly."""
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * periods)  # within the original length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return periods / ((1 - kept) / scaling["factor"] + kept)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in half-rotation form: dimension d pairs with d + D / 2. x is [B, H, T, D]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding; `window` is None for full attention."""

    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window = config.window(layer)
        self.head_dim = config.softmax_head_dim
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        bias = getattr(config, "qkv_bias", True)
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        if getattr(config, "qk_norm", False):
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden: torch.Tensor,
        layout: TokenLayout,
        rotary: tuple[torch.Tensor, ...],
        cache: KeyValueLayer | None = None,
    ) -> torch.Tensor:
        """[B, T, hidden] -> [B, T, hidden]."""
        heads = (*hidden.shape[:2], -1, self.head_dim)
        query = rotate(self.q_norm(self.q_proj(hidden).view(heads)).transpose(1, 2), *rotary)  # [B, H, T, D]
        key = rotate(self.k_norm(self.k_proj(hidden).view(heads)).transpose(1, 2), *rotary)  # [B, G, T, D]
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        if cache is None:
            key_counts = None if layout.dense else layout.key_counts()
        else:
            key, value, key_counts = cache.update(key, value, layout)
        dropout = self.config.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation or "sdpa"
        out = attend(self, query, key, value, key_counts, layout, self.window, implementation, dropout)
        return self.o_proj(out)
