"""Gated DeltaNet: gated delta rule with static causal convolutions on queries, keys and values."""

import torch
from torch import nn

from .configuration_megatron_jet import JetNemotronConfig
from .delta_rule_mixer import DeltaRuleMixer
from .linear_mixer import States
from .short_conv import causal_conv


class ShortConv1d(nn.Module):
    """Causal depthwise convolution. No `nn.Conv1d`: adapters know how to wrap that, and this needs the state as well.

    Its weight has the shape and the name that an `nn.Conv1d` would give it.
    """

    def __init__(self, channels: int, conv_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, conv_size))

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None, cu_seqlens: torch.Tensor | None, keep_state: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """SiLU of the convolved x [B, T, D] and the last W - 1 inputs of each sequence [N, W - 1, D]."""
        return causal_conv(
            x,
            self.weight.squeeze(1),
            initial_state=state,
            output_final_state=keep_state,
            cu_seqlens=cu_seqlens,
            activation="silu",
        )


class GatedDeltaNet(DeltaRuleMixer):
    """q, k and v = SiLU(conv(W h)), as flash-linear-attention builds it (arXiv 2412.06464)."""

    kind = "gated_delta_net"

    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_conv1d = ShortConv1d(self.key_dim, self.conv_size)
        self.k_conv1d = ShortConv1d(self.key_dim, self.conv_size)
        self.v_conv1d = ShortConv1d(self.value_dim, self.conv_size)

    def qkv(
        self, x: torch.Tensor, states: States, cu_seqlens: torch.Tensor | None, keep_states: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, States]:
        """See `DeltaRuleMixer.qkv`."""
        convolved, after = [], {}
        for name in ("q", "k", "v"):
            projection, conv = getattr(self, f"{name}_proj"), getattr(self, f"{name}_conv1d")
            state = states.get(f"conv_{name}")
            out, after[f"conv_{name}"] = conv(projection(x), state, cu_seqlens, keep_states)
            convolved.append(out)
        return *convolved, after
