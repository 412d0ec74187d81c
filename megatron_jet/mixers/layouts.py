"""Hugging Face tensors <-> checkpoint tensors, by the layout of a row. Pure permutations: both ways are bit-exact."""

import torch
from torch import Tensor

from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.params import ParamRow


def join(row: ParamRow, tensors: list[Tensor], model: ModelConfig) -> Tensor:
    """The checkpoint tensor made of a row's Hugging Face tensors (in the order of `row.hf`)."""
    if row.layout == "copy":
        return tensors[0]
    if row.layout == "concat":
        return torch.cat(tensors)
    groups = model.num_key_value_heads
    return torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1).flatten(0, 1)


def split(row: ParamRow, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    """Inverse of `join`."""
    if row.layout == "copy":
        return [tensor]
    sizes = [shape[0] for shape in row.shapes]
    if row.layout == "concat":
        return list(tensor.split(sizes))
    groups = model.num_key_value_heads
    parts = tensor.unflatten(0, (groups, -1)).split([size // groups for size in sizes], dim=1)
    return [part.flatten(0, 1).contiguous() for part in parts]
