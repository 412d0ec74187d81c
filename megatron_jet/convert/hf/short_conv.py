"""Causal depthwise convolution with static weights, in plain PyTorch.

This file needs nothing but torch, because exported checkpoints carry a copy of it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y_t = sum over w of weight[:, w] * x[t - (W - 1) + w] + bias, computed in fp32.

    Args:
        x: [B, T, D].
        weight: [D, W]; tap W - 1 meets the current token.
        bias: [D].
        initial_state: [N, W - 1, D], the inputs before each sequence, oldest first; by default zeros.
        output_final_state: also return the last W - 1 inputs of each sequence.
        cu_seqlens: int [N + 1], sequence boundaries of a packed batch (then B = 1).
        activation: None or "silu", applied to y.

    Returns:
        y [B, T, D] in the dtype of `x`, and the final state [N, W - 1, D] in the dtype of `x` or None.

    Raises:
        ValueError: if shapes, boundaries or the activation are not as above.
    """
    dim, width = x.shape[-1], weight.shape[-1]
    if tuple(weight.shape) != (dim, width):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [D, W] with D = {dim}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is neither None nor 'silu'")
    padded, first = _with_history(x, width, initial_state, cu_seqlens)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    taps = weight.to(dtype).unbind(-1)
    if first is None:
        time = x.shape[1]
        windows = [padded[:, w : w + time] for w in range(width)]
        final = padded[:, time:]
    else:
        windows = [padded[first + w].unsqueeze(0) for w in range(width)]
        number = torch.arange(len(cu_seqlens) - 1, device=x.device)
        last = cu_seqlens[1:].to(x.device) + number * (width - 1)
        final = padded[last[:, None] + torch.arange(width - 1, device=x.device)]
    y = sum(window.to(dtype) * tap for window, tap in zip(windows, taps))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final if output_final_state else None


def _with_history(
    x: torch.Tensor, width: int, initial_state: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Puts each sequence's earlier inputs in front of it.

    Returns [B, W - 1 + T, D] and None for a dense batch. For a packed one, [T + N * (W - 1), D] and
    the row of the oldest input in each token's window [T].
    """
    batch, time, dim = x.shape
    reach = width - 1
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = x.new_zeros(sequences, reach, dim)
    elif tuple(initial_state.shape) != (sequences, reach, dim):
        raise ValueError(f"conv state has shape {tuple(initial_state.shape)}, expected {(sequences, reach, dim)}")
    initial_state = initial_state.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat([initial_state, x], 1), None
    bounds = cu_seqlens.tolist()
    if batch != 1 or bounds[0] != 0 or bounds[-1] != time or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens {bounds} must rise from 0 to T={time} in a packed batch of 1, not {batch}")
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    padded = torch.cat([piece for pair in zip(initial_state, x[0].split(lengths)) for piece in pair])
    number = torch.repeat_interleave(torch.arange(sequences), torch.tensor(lengths))
    return padded, (torch.arange(time) + number * reach).to(x.device)
