"""The gated delta rule part that JetBlock and Gated DeltaNet share: decay, write strength, rows, initial weights."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from jet_kernels import dispatch
from megatron_jet.configs.mixers.delta_rule import DeltaRuleConfig
from megatron_jet.configs.mixers.gla import GLAConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.linear import LinearMixer
from megatron_jet.mixers.params import AttentionWeights, ParamRow, copy_head_columns, copy_head_rows, draw

SECTIONS = ("query", "key", "value", "gate", "a", "b")


class DeltaRuleMixer(LinearMixer):
    """S <- exp(g) S + k (beta (v - exp(g) S^T k))^T, read with q (FACTS 2; arXiv 2412.06464)."""

    def __init__(self, config, submodules, mixer: DeltaRuleConfig, *, pg_collection, **_):
        super().__init__(
            config,
            submodules,
            sections=section_widths(mixer),
            value_dim=mixer.value_dim,
            head_v_dim=mixer.head_v_dim,
            norm_eps=mixer.norm_eps,
            pg_collection=pg_collection,
        )
        self.mixer = mixer
        # exp(A_log) spans four orders of magnitude, too many for bf16.
        self.add_sharded("A_log", (mixer.num_heads,), torch.float32)
        self.add_sharded("dt_bias", (mixer.num_heads,))
        for parameter in (self.A_log, self.dt_bias):
            parameter._no_weight_decay = True

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, parts: dict[str, Tensor], cu_seqlens: Tensor | None
    ) -> Tensor:
        """q, k [b, s, heads * d_k] and v [b, s, heads * d_v] after their activations -> [b, s, heads, d_v]."""
        q, k = (dispatch.l2_normalize(self.heads(x, self.mixer.head_dim)) for x in (q, k))
        v = self.heads(v, self.mixer.head_v_dim)
        beta = parts["b"].float().sigmoid()  # [b, s, heads]
        g = -self.A_log.float().exp() * F.softplus(parts["a"].float() + self.dt_bias.float())
        o, _ = dispatch.chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens)
        return o


def section_widths(mixer: DeltaRuleConfig) -> dict[str, int]:
    """Full widths of the input projection's sections."""
    widths = (mixer.key_dim, mixer.key_dim, mixer.value_dim, mixer.value_dim, mixer.num_heads, mixer.num_heads)
    return dict(zip(SECTIONS, widths, strict=True))


def delta_rule_rows(mixer: DeltaRuleConfig, model: ModelConfig) -> list[ParamRow]:
    """Rows of the parameters that both mixers have."""
    h = model.hidden_size
    names = ("q_proj", "k_proj", "v_proj", "g_proj", "a_proj", "b_proj")
    rows = [
        ParamRow(f"in_proj.weight.{section}", (f"{name}.weight",), ((width, h),))
        for (section, width), name in zip(section_widths(mixer).items(), names, strict=True)
    ]
    return [
        *rows,
        ParamRow("out_proj.weight", ("o_proj.weight",), ((h, mixer.value_dim),)),
        ParamRow("o_norm.weight", ("o_norm.weight",), ((mixer.head_v_dim,),)),
        ParamRow("A_log", ("A_log",), ((mixer.num_heads,),), dtype=torch.float32),
        ParamRow("dt_bias", ("dt_bias",), ((mixer.num_heads,),)),
    ]


def delta_rule_start(mixer: DeltaRuleConfig, model: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Initial tensors of `delta_rule_rows`.

    A ~ U(0, 16); dt log-uniform in [1e-3, 1e-1] with floor 1e-4 and dt_bias its inverse softplus (the published code).
    """
    tensors = {}
    for row in delta_rule_rows(mixer, model):
        if len(row.shapes[0]) == 2:
            tensors[row.hf[0]] = draw(row.shapes[0], model.initializer_range, generator)
    tensors["o_norm.weight"] = torch.ones(mixer.head_v_dim)
    uniform = torch.rand(2, mixer.num_heads, generator=generator)
    tensors["A_log"] = (uniform[0] * 16).clamp(min=1e-4).log()  # a draw of exactly 0 would be -inf
    dt = (uniform[1] * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3)).exp().clamp(min=1e-4)
    tensors["dt_bias"] = dt + (-torch.expm1(-dt)).log()
    return tensors


def copy_teacher(mixer: DeltaRuleConfig | GLAConfig, tensors: dict[str, Tensor], teacher: AttentionWeights) -> None:
    """Put the matching head slices of a softmax layer's Q, K, V and O into a linear mixer's tensors, in place."""
    heads = mixer.num_heads
    copy_head_rows(tensors["q_proj.weight"], teacher.q, heads, teacher.num_heads)
    copy_head_rows(tensors["k_proj.weight"], teacher.k, heads, teacher.num_kv_heads)
    copy_head_rows(tensors["v_proj.weight"], teacher.v, heads, teacher.num_kv_heads)
    copy_head_columns(tensors["o_proj.weight"], teacher.o, heads, teacher.num_heads)
