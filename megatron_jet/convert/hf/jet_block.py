"""JetBlock: gated delta rule whose values pass a convolution with one kernel per token and channel."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_megatron_jet import JetNemotronConfig
from .delta_rule_mixer import DeltaRuleMixer
from .dynamic_conv import dynamic_causal_conv
from .linear_mixer import States


class GeneratorLinear(nn.Linear):
    """A linear layer of the kernel generator; its own class because it starts at zero, as a static convolution."""


class KernelGenerator(nn.Module):
    """h -> Linear -> SiLU -> Linear: the taps of every channel; output index is channel * W + tap."""

    def __init__(self, hidden_size: int, bottleneck: int, channels: int, conv_size: int) -> None:
        super().__init__()
        self.w1 = GeneratorLinear(hidden_size, bottleneck, bias=False)
        self.w2 = GeneratorLinear(bottleneck, channels * conv_size, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)))


class DynamicConv1d(nn.Module):
    """Causal convolution, W taps wide, with kernels made from the layer's input; tap W - 1 is the current token."""

    def __init__(self, hidden_size: int, channels: int, conv_size: int, reduction: int) -> None:
        super().__init__()
        if channels < reduction:
            raise ValueError(f"jet: dconv_generator_reduction={reduction} is larger than the {channels} value channels")
        self.conv_size = conv_size
        self.kernel_generator = KernelGenerator(hidden_size, channels // reduction, channels, conv_size)

    def forward(
        self,
        v: torch.Tensor,
        x: torch.Tensor,
        state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        keep_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """SiLU of the convolved v [B, T, D] and the last W - 1 inputs of each sequence [N, W - 1, D]."""
        kernel = self.kernel_generator(x).unflatten(-1, (-1, self.conv_size))  # [B, T, D, W]
        return dynamic_causal_conv(
            v,
            kernel,
            initial_state=state,
            output_final_state=keep_state,
            cu_seqlens=cu_seqlens,
            activation="silu",
        )


class JetBlock(DeltaRuleMixer):
    """q = SiLU(W_q h), k = SiLU(W_k h), v = SiLU(dynconv(W_v h)); no rotary embedding (arXiv 2508.15884)."""

    kind = "jet"

    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__(config, layer)
        reduction = config.mixer_settings("jet")["dconv_generator_reduction"]
        self.dynamic_conv1d = DynamicConv1d(config.hidden_size, self.value_dim, self.conv_size, reduction)

    def qkv(
        self, x: torch.Tensor, states: States, cu_seqlens: torch.Tensor | None, keep_states: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, States]:
        """See `DeltaRuleMixer.qkv`."""
        v, conv_state = self.dynamic_conv1d(self.v_proj(x), x, states.get("conv"), cu_seqlens, keep_states)
        return F.silu(self.q_proj(x)), F.silu(self.k_proj(x)), v, {"conv": conv_state}
