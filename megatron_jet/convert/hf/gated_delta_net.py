"""Gated DeltaNet: gated delta rule with static causal convolutions on queries, keys and values."""

import torch
from torch import nn

from .configuration_megatron_jet import JetNemotronConfig
from .delta_rule_mixer import DeltaRuleMixer
from .linear_mixer import States
from .short_conv import causal_conv


class GatedDeltaNet(DeltaRuleMixer):
    """q, k and v = SiLU(conv(W h)), as flash-linear-attention builds it (arXiv 2412.06464)."""

    kind = "gated_delta_net"

    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__(config, layer)
        # Conv1d holds the weight [D, 1, W] under its usual name; the convolution is causal_conv's.
        self.q_conv1d = nn.Conv1d(self.key_dim, self.key_dim, self.conv_size, groups=self.key_dim, bias=False)
        self.k_conv1d = nn.Conv1d(self.key_dim, self.key_dim, self.conv_size, groups=self.key_dim, bias=False)
        self.v_conv1d = nn.Conv1d(self.value_dim, self.value_dim, self.conv_size, groups=self.value_dim, bias=False)

    def qkv(
        self, x: torch.Tensor, states: States, cu_seqlens: torch.Tensor | None, keep_states: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, States]:
        """See `DeltaRuleMixer.qkv`."""
        convolved, after = [], {}
        for name in ("q", "k", "v"):
            projection, conv = getattr(self, f"{name}_proj"), getattr(self, f"{name}_conv1d")
            out, after[f"conv_{name}"] = causal_conv(
                projection(x),
                conv.weight.squeeze(1),
                initial_state=states.get(f"conv_{name}"),
                output_final_state=keep_states,
                cu_seqlens=cu_seqlens,
                activation="silu",
            )
            convolved.append(out)
        return *convolved, after
