"""Full Hugging Face tensors <-> full checkpoint tensors, by the parameter table. Bit-exact both ways."""

from collections.abc import Mapping

from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.layouts import join, split
from megatron_jet.mixers.params import ParamRow
from megatron_jet.model.param_table import param_table


def hf_to_megatron(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint tensors of a whole model.

    Args:
        model: the model.
        tensors: its Hugging Face state dict. With tied embeddings an `lm_head.weight` may be there and is not read.

    Raises:
        UserError: a tensor is missing, is not part of the model, or has another shape; the message names it.
    """
    rows = param_table(model)
    check_names(model, tensors)
    return {row.key: join_row(row, tensors, model) for row in rows}


def megatron_to_hf(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `hf_to_megatron`. Also maps gradients, since every layout is a permutation.

    Raises:
        UserError: a checkpoint tensor is missing or has another shape.
    """
    result = {}
    for row in param_table(model):
        if row.key not in tensors:
            raise UserError(f"checkpoint has no tensor '{row.key}'")
        result |= split_row(row, tensors[row.key], model)
    return result


def join_row(row: ParamRow, tensors: Mapping[str, Tensor], model: ModelConfig) -> Tensor:
    """The checkpoint tensor of one row. Raises UserError naming a tensor that is missing or mis-shaped."""
    for name, shape in zip(row.hf, row.shapes, strict=True):
        if name not in tensors:
            raise UserError(f"tensor '{name}' is missing")
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"tensor '{name}' has shape {list(tensors[name].shape)}, the model needs {list(shape)}")
    return join(row, [tensors[name] for name in row.hf], model)


def split_row(row: ParamRow, tensor: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """The Hugging Face tensors of one row. Raises UserError when the checkpoint tensor has another shape."""
    if tuple(tensor.shape) != row.global_shape:
        raise UserError(
            f"checkpoint tensor '{row.key}' has shape {list(tensor.shape)}, the model needs {list(row.global_shape)}"
        )
    return dict(zip(row.hf, split(row, tensor, model), strict=True))


def check_names(model: ModelConfig, names: Mapping[str, Tensor] | set[str]) -> None:
    """Raise UserError when a name is not part of the model."""
    known = {name for row in param_table(model) for name in row.hf}
    if model.tie_word_embeddings:
        known.add("lm_head.weight")
    extra = sorted(set(names) - known)
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"tensor '{extra[0]}'{more} is not part of the model")
