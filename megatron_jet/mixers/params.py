"""One row per tensor: its checkpoint key, its Hugging Face names and shapes, and how one becomes the other."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["copy", "concat", "qkv"]


@dataclass(frozen=True)
class ParamRow:
    """A tensor of a Megatron checkpoint and the Hugging Face tensors it is made of.

    Attributes:
        key: checkpoint key of the global tensor (not of one rank's shard).
        hf: names of the Hugging Face tensors.
        shapes: their shapes, in the same order.
        layout: `copy` (one tensor, as it is), `concat` (joined along dimension 0) or `qkv` (Megatron's order of heads:
            for every key/value group its queries, then its key, then its value).
        dtype: set for tensors that stay in this type whatever the model's is.
    """

    key: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout = "copy"
    dtype: torch.dtype | None = None

    def prefixed(self, key: str, hf: str) -> "ParamRow":
        """The row with prefixes put before the checkpoint key and the Hugging Face names."""
        return replace(self, key=key + self.key, hf=tuple(hf + name for name in self.hf))

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


@dataclass(frozen=True)
class AttentionWeights:
    """A softmax layer's full weights in Hugging Face layout, the source of a linear mixer's start.

    q [num_heads * head_dim, h], k and v [num_kv_heads * head_dim, h], o [h, num_heads * head_dim].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int


def copy_head_rows(target: Tensor, source: Tensor, target_heads: int, source_heads: int) -> None:
    """Copy the head slices that match from `source` into `target`, in place.

    Head i of the target takes the head at the same relative place in the source (key/value heads are thereby repeated)
    and as many of its rows as both have; the other rows keep what they hold.

    Args:
        target: [target_heads * d_target, h]; source: [source_heads * d_source, h].
    """
    rows = target.view(target_heads, -1, target.shape[-1])
    heads = source.view(source_heads, -1, source.shape[-1])
    width = min(rows.shape[1], heads.shape[1])
    place = torch.arange(target_heads) * source_heads // target_heads
    rows[:, :width] = heads[place, :width].to(rows.dtype)


def copy_head_columns(target: Tensor, source: Tensor, target_heads: int, source_heads: int) -> None:
    """`copy_head_rows` for an output projection, whose head slices are columns: target [h, target_heads * d]."""
    columns = target.t().contiguous()
    copy_head_rows(columns, source.t().contiguous(), target_heads, source_heads)
    target.copy_(columns.t())


def draw(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """N(0, std) in fp32 on the CPU."""
    return torch.empty(shape).normal_(0.0, std, generator=generator)
