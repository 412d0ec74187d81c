"""A model's weights as global tensors, whatever the layout: load full tensors into shards, gather shards in full."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor, nn

# Layers differ, so each has its own keys; shards of fused tensors keep the key of the whole.
CHECKPOINT_METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": False}


def unwrap(chunk: nn.Module) -> nn.Module:
    """The GPTModel inside DDP and other wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def sharded_state(chunks: list[nn.Module]) -> dict[str, dict]:
    """Megatron's sharded state dict of all chunks, by chunk name, without Transformer Engine's extra states."""
    metadata = {
        **CHECKPOINT_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {}
    for i, chunk in enumerate(chunks):
        tensors = unwrap(chunk).sharded_state_dict(metadata=metadata)
        state[f"model{i}"] = {key: value for key, value in tensors.items() if not key.endswith("_extra_state")}
    return state


def local_shards(chunks: list[nn.Module]) -> list[ShardedTensor]:
    """This rank's shards. Their `data` are views of the parameters, so writing to them writes the model."""
    state = sharded_state(chunks)
    apply_factories(state)
    return [shard for shard in nested_values(state) if isinstance(shard, ShardedTensor)]


def local_keys(chunks: list[nn.Module]) -> set[str]:
    """Checkpoint keys of which this rank holds a part."""
    return {shard.key for shard in local_shards(chunks)}


@torch.no_grad()
def load_tensors(
    chunks: list[nn.Module], tensors: Mapping[str, Tensor] | Callable[[str], Tensor], *, strict: bool = True
) -> None:
    """Copy full tensors into this rank's shards.

    Args:
        chunks: the model of this rank.
        tensors: full tensors by checkpoint key, or a function from key to tensor (called once per key held here, so a
            large model can be streamed). Keys that this rank does not hold are not looked at.
        strict: every key held here must be given; otherwise the others keep their values.

    Raises:
        KeyError: a tensor is missing (strict).
        ValueError: a tensor has another shape than the model's.
    """
    by_key: dict[str, list[ShardedTensor]] = {}
    for shard in local_shards(chunks):
        by_key.setdefault(shard.key, []).append(shard)
    for key, shards in by_key.items():
        if not callable(tensors) and key not in tensors:
            if strict:
                raise KeyError(f"no tensor for {key}")
            continue
        full = tensors(key) if callable(tensors) else tensors[key]
        if tuple(full.shape) != tuple(shards[0].global_shape):
            raise ValueError(f"{key}: shape {tuple(full.shape)}, the model has {tuple(shards[0].global_shape)}")
        for shard in shards:
            shard.data.detach().copy_(full[shard.global_slice()])


@torch.no_grad()
def gather_tensors(chunks: list[nn.Module]) -> dict[str, Tensor] | None:
    """All tensors in full on rank 0's CPU, by checkpoint key; None on the other ranks. For models that fit there."""
    pieces = [
        (shard.key, shard.global_slice(), tuple(shard.global_shape), shard.data.detach().cpu().clone())
        for shard in local_shards(chunks)
        if is_main_replica(shard.replica_id)
    ]
    rank = dist.get_rank()
    gathered: list = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(pieces, gathered, dst=0)
    if rank != 0:
        return None
    tensors: dict[str, Tensor] = {}
    for key, where, shape, data in (piece for part in gathered for piece in part):
        if key not in tensors:
            tensors[key] = torch.empty(shape, dtype=data.dtype)
        tensors[key][where] = data
    return tensors
