"""Supernets: which path of each layer runs, and moving weights between a supernet and the models inside it."""

from collections.abc import Iterator, Mapping, Sequence

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers import attention
from megatron_jet.mixers.choice import ChoiceMixer, choice_spec, weight_path
from megatron_jet.mixers.params import ParamRow
from megatron_jet.mixers.registry import mixer_definition
from megatron_jet.model.param_table import mixer_rows, param_table
from megatron_jet.model.state import unwrap

# The plan entries that each layer may take, for example (("attn", "gla"), ("attn", "gla", "swa:64"), ...).
Choices = tuple[tuple[str, ...], ...]


def check_choices(model: ModelConfig, choices: Choices) -> None:
    """Raise UserError unless there is a set of choices per layer that holds the layer plan's entry.

    A windowed path needs "attn" beside it, whose weights it runs.
    """
    if len(choices) != model.num_layers:
        raise UserError(f"choices are given for {len(choices)} layers but the model has {model.num_layers}")
    for i, (names, entry) in enumerate(zip(choices, model.layer_plan, strict=True)):
        for name in names:
            model.mixer_of(name)
            if weight_path(name) not in names:
                raise UserError(f"choices of layer {i}: '{name}' needs 'attn' among them, whose weights it runs")
        if entry not in names:
            raise UserError(f"choices of layer {i} are {', '.join(names)}, without the layer plan's '{entry}'")


def choice_layer_spec(
    model: ModelConfig, names: tuple[str, ...], selected: str, backend: BackendSpecProvider
) -> ModuleSpec:
    """Spec of one supernet layer's mixer."""
    windows = tuple(window for window in (split_entry(name)[1] for name in names) if window is not None)
    paths = {}
    for name in names:
        config = model.mixer_of(name)
        if name == "attn":
            paths[name] = attention.spec(config, model, backend, more_windows=windows)
        elif weight_path(name) == name:
            paths[name] = mixer_definition(name).spec(config, model, backend)
    return choice_spec(names, selected, paths)


def choice_mixers(chunks: Sequence[nn.Module]) -> Iterator[tuple[int, ChoiceMixer]]:
    """(global 0-based layer, its ChoiceMixer) of this rank's supernet layers."""
    for chunk in chunks:
        for layer in unwrap(chunk).decoder.layers:
            if isinstance(layer.self_attention, ChoiceMixer):
                yield layer.layer_number - 1, layer.self_attention


def set_paths(chunks: Sequence[nn.Module], plan: Sequence[str]) -> None:
    """Select one path per layer for the following forwards.

    Args:
        chunks: this rank's supernet.
        plan: an entry for every layer of the whole model, the same on all ranks.
    """
    for layer, mixer in choice_mixers(chunks):
        mixer.select(plan[layer])


def idle_parameters(chunks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Parameters of all paths that are not selected: an optimiser must leave them and their moments alone."""
    return [parameter for _, mixer in choice_mixers(chunks) for parameter in mixer.idle_parameters()]


def supernet_table(model: ModelConfig, choices: Choices) -> list[ParamRow]:
    """`param_table` of a supernet.

    A path's checkpoint keys are `...self_attention.paths.<name>.<tensor>`. The path of the layer plan has the usual
    Hugging Face names; the others, which no Hugging Face model has, are put under `self_attn.paths.<name>.`.
    """
    rows = []
    for row in param_table(model):
        if ".self_attention." not in row.key:
            rows.append(row)
    for i, names in enumerate(choices):
        for path in dict.fromkeys(weight_path(name) for name in names):
            for row in mixer_rows(model, path):
                hf = row.hf if path == weight_path(model.layer_plan[i]) else _under_paths(row.hf, path)
                renamed = ParamRow(supernet_key(row.key, path), hf, row.shapes, row.layout, row.dtype)
                rows.append(renamed.prefixed(f"decoder.layers.{i}.", f"model.layers.{i}."))
    return rows


def supernet_key(key: str, path: str) -> str:
    """Checkpoint key of a plain model's mixer tensor inside a supernet, where it belongs to `path`."""
    return key.replace("self_attention.", f"self_attention.paths.{path}.", 1)


def extract_plan(tensors: Mapping[str, Tensor], plan: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of one model inside a supernet, under a plain model's checkpoint keys.

    Args:
        tensors: the supernet's full tensors by checkpoint key.
        plan: the model's layer plan, one of the supernet's choices per layer.
    """
    taken = {}
    for key, tensor in tensors.items():
        before, found, after = key.partition("self_attention.paths.")
        if not found:
            taken[key] = tensor
            continue
        path, _, name = after.partition(".")
        if weight_path(plan[int(before.split(".")[2])]) == path:
            taken[f"{before}self_attention.{name}"] = tensor
    return taken


def insert_plan(tensors: Mapping[str, Tensor], plan: Sequence[str]) -> dict[str, Tensor]:
    """Inverse of `extract_plan`: a plain model's tensors under the supernet's keys of the paths in `plan`."""
    placed = {}
    for key, tensor in tensors.items():
        if ".self_attention." in key:
            key = supernet_key(key, weight_path(plan[int(key.split(".")[2])]))
        placed[key] = tensor
    return placed


def _under_paths(names: tuple[str, ...], path: str) -> tuple[str, ...]:
    return tuple(name.replace("self_attn.", f"self_attn.paths.{path}.", 1) for name in names)
