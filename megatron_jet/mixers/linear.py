"""What all linear mixers share: one fused input projection by heads, tensor and sequence parallelism, sharding.

Parallel layout: heads are divided over the tensor-parallel ranks. The input projection is column-parallel and the
output projection row-parallel; between them every rank has all tokens of its own heads, also with sequence parallelism.
"""

from dataclasses import dataclass

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from jet_kernels import dispatch
from megatron_jet.configs.errors import UserError


@dataclass
class LinearMixerSubmodules:
    """The two projections, chosen by the backend."""

    in_proj: type
    out_proj: type


def linear_submodules(backend: BackendSpecProvider) -> LinearMixerSubmodules:
    """Projections for a linear mixer's spec."""
    return LinearMixerSubmodules(in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear())


class LinearMixer(MegatronModule):
    """Base of the linear mixers. A subclass names the sections of the input projection and computes `mix`.

    Args:
        config: Megatron's config.
        submodules: the projections.
        sections: full width of every section of the input projection, by name. Each is divided over the ranks by
            itself; a contiguous split of the whole would hand one rank the queries and the other the values.
        value_dim: full width of the output projection's input.
        head_v_dim: width of one value head, the size of the norm.
        norm_eps: eps of the output norm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LinearMixerSubmodules,
        *,
        sections: dict[str, int],
        value_dim: int,
        head_v_dim: int,
        norm_eps: float,
        pg_collection,
    ):
        super().__init__(config)
        if config.context_parallel_size > 1:
            raise UserError("context parallelism is not supported yet; use context=1")
        self.tp_group = pg_collection.tp
        self.tp = self.tp_group.size()
        self.sections = {name: width // self.tp for name, width in sections.items()}
        if config.fp8 and sum(self.sections.values()) % 16:
            raise UserError(f"fp8 needs an input projection that divides by 16 on every rank, not {self.sections}")
        self.head_v_dim, self.norm_eps = head_v_dim, norm_eps
        self._sharded_parameters: list[str] = []
        common = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            sum(sections.values()),
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.out_proj = submodules.out_proj(
            value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **common,
        )
        self.o_norm = nn.Module()
        self.o_norm.weight = self.make_parameter((head_v_dim,))

    def make_parameter(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> nn.Parameter:
        """A parameter that is the same on all tensor-parallel ranks, zero until the model is initialised."""
        return nn.Parameter(
            torch.zeros(shape, dtype=dtype or self.config.params_dtype, device=torch.cuda.current_device())
        )

    def add_sharded(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
        """Register a parameter whose first dimension is divided over the tensor-parallel ranks.

        Args:
            name: attribute name.
            shape: full shape.
        """
        parameter = self.make_parameter((shape[0] // self.tp, *shape[1:]), dtype)
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        self.register_parameter(name, parameter)
        self._sharded_parameters.append(name)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **_,
    ) -> tuple[Tensor, None]:
        """Mix tokens.

        Args:
            hidden_states: normed input [s(/tp with sequence parallelism), b, h].
            attention_mask: must be None, the mixers are causal.
            packed_seq_params: cu_seqlens when the row (b = 1) holds several sequences.

        Returns:
            [s(/tp), b, h] and no bias.
        """
        if attention_mask is not None:
            raise ValueError("linear mixers take no mask; pass packed_seq_params instead")
        cu_seqlens = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        projected, _ = self.in_proj(hidden_states)  # [s, b, sections / tp]
        projected = projected.transpose(0, 1)  # [b, s, sections / tp]
        parts = dict(zip(self.sections, projected.split(list(self.sections.values()), dim=-1), strict=True))
        o = self.mix(hidden_states, parts, cu_seqlens)  # [b, s, heads / tp, d_v]
        gate = self.heads(parts["gate"], self.head_v_dim)
        # The norm's weight is the same on all ranks but each sees only its own heads, so its gradient is summed over
        # TP here. Megatron would do that only with sequence parallelism, and only for marked parameters.
        weight = copy_to_tensor_model_parallel_region(self.o_norm.weight, group=self.tp_group)
        o = dispatch.rms_norm_gated(o, weight, gate, self.norm_eps)
        return self.out_proj(o.flatten(2).transpose(0, 1).contiguous())

    def mix(self, hidden_states: Tensor, parts: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
        """The recurrence.

        Args:
            hidden_states: [s(/tp), b, h], for what is generated from the input besides the sections.
            parts: the sections of the input projection, [b, s, width / tp] each.
            cu_seqlens: boundaries of packed sequences [N + 1], or None.

        Returns:
            [b, s, heads / tp, d_v]
        """
        raise NotImplementedError

    @staticmethod
    def heads(x: Tensor, width: int) -> Tensor:
        """[b, s, heads * width] -> [b, s, heads, width]."""
        return x.unflatten(-1, (-1, width))

    def low_rank(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        """A narrow projection of the input that every rank needs in full: [s(/tp), b, h] -> [b, s, rank].

        It is computed on this rank's tokens (all of them without sequence parallelism), and only its narrow result is
        gathered. `weight` [rank, h] is replicated; with sequence parallelism it must be marked `sequence_parallel`.
        """
        low = nn.functional.linear(hidden_states, weight)
        if self.config.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return low.transpose(0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Every section of the input projection is a global tensor of its own, so that any TP size can load it."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        state = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(self._sharded_parameters, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        key = f"{prefix}in_proj.weight"
        state[key] = _split_tensor_factory(state[key], list(self.sections.values()), list(self.sections), 0)
        return state
