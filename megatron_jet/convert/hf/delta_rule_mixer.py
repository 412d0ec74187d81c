"""What JetBlock and Gated DeltaNet share: projections, decay, the gated delta rule and the gated output."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_megatron_jet import JetNemotronConfig
from .gated_delta_rule import l2_normalize
from .linear_mixer import GatedRMSNorm, LinearMixer, States
from .recurrence import gated_delta_rule


class DeltaRuleMixer(LinearMixer):
    """S <- exp(g) S; S <- S + k (beta (v - S^T k))^T; o = S^T q / sqrt(d_k); out = W_o(RMSNorm(o) * SiLU(W_g h)).

    Subclasses say where q, k and v come from. Sources: Gated DeltaNet (arXiv 2412.06464), Jet-Nemotron (2508.15884).
    """

    kind = ""

    def __init__(self, config: JetNemotronConfig, layer: int) -> None:
        super().__init__()
        settings = config.mixer_settings(self.kind)
        self.num_heads, self.head_dim = settings["num_heads"], settings["head_dim"]
        self.head_v_dim, self.conv_size = settings["head_v_dim"], settings["conv_size"]
        self.key_dim, self.value_dim = self.num_heads * self.head_dim, self.num_heads * self.head_v_dim
        self.q_proj = nn.Linear(config.hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, self.value_dim, bias=False)
        self.a_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.b_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True  # trainers that know the mark leave these alone
        self.o_norm = GatedRMSNorm(self.head_v_dim, settings["norm_eps"])
        self.o_proj = nn.Linear(self.value_dim, config.hidden_size, bias=False)

    @torch.no_grad()
    def init_decay(self) -> None:
        """A ~ U(0, 16); dt log-uniform in [1e-3, 1e-1] with a floor of 1e-4, and dt_bias its inverse softplus."""
        a = torch.empty_like(self.A_log).uniform_(0, 16).clamp(min=1e-4)  # log(0) would never decay nor learn
        init.copy_(self.A_log, a.log())
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp(min=1e-4)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))

    def qkv(
        self, x: torch.Tensor, states: States, cu_seqlens: torch.Tensor | None, keep_states: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, States]:
        """Queries and keys [B, T, key_dim], values [B, T, value_dim] and the convolution states after x."""
        raise NotImplementedError

    def mix(
        self, x: torch.Tensor, states: States, cu_seqlens: torch.Tensor | None, keep_states: bool
    ) -> tuple[torch.Tensor, States]:
        """See `LinearMixer.mix`."""
        q, k, v, after = self.qkv(x, states, cu_seqlens, keep_states)
        q, k = (l2_normalize(y.unflatten(-1, (self.num_heads, self.head_dim))) for y in (q, k))  # [B, T, H, Dk]
        v = v.unflatten(-1, (self.num_heads, self.head_v_dim))  # [B, T, H, Dv]
        beta = self.b_proj(x).sigmoid()  # [B, T, H]
        o, after["recurrent"] = gated_delta_rule(
            q,
            k,
            v,
            self.log_decay(x),
            beta,
            initial_state=states.get("recurrent"),
            output_final_state=keep_states,
            cu_seqlens=cu_seqlens,
        )
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.head_v_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(2)), after

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """g = -exp(A_log) * softplus(W_a h + dt_bias), per head [B, T, H], at least in fp32."""
        a = self.a_proj(x)
        dtype = torch.promote_types(a.dtype, torch.float32)
        return -self.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
