"""What the linear mixers share: state handling, and the form of their input and output."""

import torch
from torch import nn

from .cache import StateLayer
from .norm_gate import rms_norm_gated
from .token_layout import TokenLayout

States = dict[str, torch.Tensor]


class GatedRMSNorm(nn.Module):
    """RMSNorm(o) * weight * SiLU(gate) per value head; one weight for all heads."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return rms_norm_gated(o, self.weight, gate, self.eps)


class LinearMixer(nn.Module):
    """A mixer whose memory of the past is a state of constant size.

    It works on real tokens only: with padding or packed documents they come as one packed row with
    boundaries, so that padding touches no state and no document sees another.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        layout: TokenLayout,
        rotary: tuple[torch.Tensor, ...],
        cache: StateLayer | None = None,
    ) -> torch.Tensor:
        """[B, T, hidden] -> [B, T, hidden]; padding gets zeros. Linear mixers use no rotary embedding."""
        packed = layout.pack(hidden)
        if packed.shape[1] == 0:
            return torch.zeros_like(hidden)
        before = {} if cache is None else cache.read(layout)
        cu_seqlens = None if layout.sequences is None else layout.sequences.cu_seqlens
        out, after = self.mix(packed, before, cu_seqlens, cache is not None)
        if cache is not None:
            cache.write(after, layout)
        return layout.unpack(out)

    def mix(
        self, x: torch.Tensor, states: States, cu_seqlens: torch.Tensor | None, keep_states: bool
    ) -> tuple[torch.Tensor, States]:
        """The mixer itself.

        Args:
            x: [B, T, hidden], or [1, M, hidden] with boundaries.
            states: before each sequence [N, ...]; empty where all start from zero.
            cu_seqlens: boundaries [N + 1] of a packed row, or None.
            keep_states: whether the states after each sequence are wanted.

        Returns:
            Output of the shape of `x`, and the states by name (meaningless unless wanted).
        """
        raise NotImplementedError
