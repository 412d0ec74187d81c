"""Causal convolution with one kernel per token and channel, in plain PyTorch.

This file needs nothing but torch, because exported checkpoints carry a copy of it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F


def dynamic_causal_conv(
    x: torch.Tensor,
    kernel: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    activation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y_t = sum over w of kernel[t, :, w] * x[t - (W - 1) + w], computed in fp32.

    Inputs before the start of a sequence are its initial state, or zeros (Jet-Nemotron,
    arXiv 2508.15884, section 2.3).

    Args:
        x: [B, T, D].
        kernel: [B, T, D, W]; tap W - 1 meets the current token.
        initial_state: [N, W - 1, D], the inputs before each sequence, oldest first.
        output_final_state: also return the last W - 1 inputs of each sequence.
        cu_seqlens: int [N + 1], sequence boundaries of a packed batch (then B = 1).
        activation: None or "silu", applied to y.

    Returns:
        y [B, T, D] in the dtype of `x`, and the final state [N, W - 1, D] in the dtype of `x` or None.

    Raises:
        ValueError: if shapes, boundaries or the activation are not as above.
    """
    width = kernel.shape[-1]
    if kernel.shape[:-1] != x.shape or width < 1:
        raise ValueError(f"kernel has shape {tuple(kernel.shape)}, expected {(*x.shape, 'W')}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation {activation!r} is neither None nor 'silu'")
    windows, final = causal_windows(x, width, initial_state, output_final_state, cu_seqlens)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = sum(window.to(dtype) * tap.to(dtype) for window, tap in zip(windows, kernel.unbind(-1)))
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final


def causal_windows(
    x: torch.Tensor,
    width: int,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The input that each tap of a causal convolution sees at each token.

    Args:
        x, initial_state, output_final_state, cu_seqlens: as in `dynamic_causal_conv`.
        width: W.

    Returns:
        W tensors [B, T, D], oldest tap first, and the final state [N, W - 1, D] or None.

    Raises:
        ValueError: if the state or the boundaries do not fit `x`.
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
        padded = torch.cat([initial_state, x], 1)
        return [padded[:, w : w + time] for w in range(width)], padded[:, time:] if output_final_state else None

    bounds = cu_seqlens.tolist()
    if batch != 1 or bounds[0] != 0 or bounds[-1] != time or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens {bounds} must rise from 0 to T={time} in a packed batch of 1, not {batch}")
    # Each sequence follows its own state in `padded`, so a window never sees another sequence.
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    pieces = [piece for pair in zip(initial_state, x[0].split(lengths)) for piece in pair]
    padded = torch.cat(pieces)  # [T + N * (W - 1), D]
    number = torch.repeat_interleave(torch.arange(sequences), torch.tensor(lengths))
    first = (torch.arange(time) + number * reach).to(x.device)  # row of the oldest input in each token's window
    windows = [padded[first + w].unsqueeze(0) for w in range(width)]
    if not output_final_state:
        return windows, None
    last = torch.tensor(bounds[1:]) + torch.arange(sequences) * reach  # row after the window's reach at each end
    return windows, padded[(last[:, None] + torch.arange(reach)).to(x.device)]
