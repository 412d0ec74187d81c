"""Gated linear attention (arXiv 2312.06635), parameterised as in flash-linear-attention."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_megatron_jet import JetNemotronConfig
from .linear_mixer import GatedRMSNorm, LinearMixer, States
from .recurrence import gated_linear_attention


class GatedLinearAttention(LinearMixer):
    """S <- Diag(alpha) S + k v^T; o = S^T q / sqrt(d_k); alpha = sigmoid(low-rank projection of h)^(1 / normalizer)."""

    kind = "gla"

    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__()
        settings = config.mixer_settings(self.kind)
        self.num_heads, self.head_dim = settings["num_heads"], settings["head_dim"]
        self.head_v_dim = settings["head_v_dim"]
        self.gate_logit_normalizer = settings["gate_logit_normalizer"]
        key_dim, value_dim = self.num_heads * self.head_dim, self.num_heads * self.head_v_dim
        self.q_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, value_dim, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, value_dim, bias=False)
        low_rank = settings["gate_low_rank_dim"]
        self.gk_proj = nn.Sequential(nn.Linear(config.hidden_size, low_rank, bias=False), nn.Linear(low_rank, key_dim))
        self.o_norm = GatedRMSNorm(self.head_v_dim, settings["norm_eps"])
        self.o_proj = nn.Linear(value_dim, config.hidden_size, bias=False)

    def mix(
        self, x: torch.Tensor, states: States, cu_seqlens: torch.Tensor | None, keep_states: bool
    ) -> tuple[torch.Tensor, States]:
        """See `LinearMixer.mix`."""
        keys, values = (self.num_heads, self.head_dim), (self.num_heads, self.head_v_dim)
        gate_logits = self.gk_proj(x)
        dtype = torch.promote_types(gate_logits.dtype, torch.float32)
        o, state = gated_linear_attention(
            self.q_proj(x).unflatten(-1, keys),
            self.k_proj(x).unflatten(-1, keys),
            self.v_proj(x).unflatten(-1, values),
            (F.logsigmoid(gate_logits.to(dtype)) / self.gate_logit_normalizer).unflatten(-1, keys),
            initial_state=states.get("recurrent"),
            output_final_state=keep_states,
            cu_seqlens=cu_seqlens,
        )
        gate = self.g_proj(x).unflatten(-1, values)
        return self.o_proj(self.o_norm(o, gate).flatten(2)), {"recurrent": state}
