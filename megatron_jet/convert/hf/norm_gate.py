"""Gated RMSNorm in plain PyTorch. Needs nothing but torch: exported checkpoints carry a copy of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_gated(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """RMSNorm(x) * weight * SiLU(gate), computed in fp32.

    Args:
        x: [..., D], normalised over the last dimension.
        weight: [D].
        gate: same shape as `x`.
        eps: added to the mean square.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(dtype) * F.silu(gate.to(dtype))).to(x.dtype)
