"""What a mixer config must say about itself: sizes, cost, and what it can be sharded over.

Cost formulas need only the hidden size and the attention shape of the model, given as `ModelShape`, so this file
imports nothing of the model config (no cycle) and no torch.
"""

from dataclasses import dataclass
from typing import ClassVar

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """The model-wide sizes that a mixer's cost depends on."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class Precision:
    """Bytes per element of the two kinds of cache: softmax K/V, and recurrent plus convolution state."""

    kv_bytes: int = 2
    state_bytes: int = 4


DEFAULT_PRECISION = Precision()


class MixerConfig(StrictModel):
    """Base of all mixer configs. `kind` is the name used in layer plans and in the registry."""

    kind: ClassVar[str]
    is_softmax: ClassVar[bool] = False

    def tensor_names(self, shape: ModelShape) -> tuple[str, ...]:
        """Names of one layer's mixer parameters, as the Megatron module has them."""
        raise NotImplementedError

    def num_params(self, shape: ModelShape) -> int:
        """Parameters of one layer's mixer, layer norms not counted."""
        raise NotImplementedError

    def flops_per_token(self, shape: ModelShape, context: int) -> float:
        """Forward FLOPs per token at a given context length in tokens (a multiply-add counts as 2)."""
        raise NotImplementedError

    def cache_bytes(self, shape: ModelShape, context: int, precision: Precision = DEFAULT_PRECISION) -> int:
        """Bytes of K/V cache or recurrent state of one sequence of `context` tokens in one layer.

        Counted as the paper counts it: without the few bytes of convolution state.
        """
        raise NotImplementedError

    def conv_state_bytes(self, shape: ModelShape, precision: Precision = DEFAULT_PRECISION) -> int:
        """Bytes of convolution state (the last conv_size - 1 inputs) of one sequence in one layer."""
        return 0

    def check(self, shape: ModelShape) -> None:
        """Raise UserError when the config cannot belong to a model of this shape."""

    def shardable_heads(self, shape: ModelShape) -> tuple[int, ...]:
        """Every head count that tensor parallelism must divide."""
        raise NotImplementedError

    def check_parallel(self, shape: ModelShape, tensor_parallel: int) -> None:
        """Raise UserError when the heads of this mixer do not divide by the tensor-parallel size."""
        for heads in self.shardable_heads(shape):
            if heads % tensor_parallel:
                raise UserError(
                    f"{self.kind}: {heads} heads do not divide by tensor_parallel={tensor_parallel}; "
                    f"choose a tensor_parallel that divides {heads}"
                )
