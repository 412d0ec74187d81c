"""Initial weights that do not depend on the layout: drawn in full from one generator per layer, then sharded."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.choice import weight_path
from megatron_jet.mixers.layouts import join
from megatron_jet.mixers.params import AttentionWeights, ParamRow, draw
from megatron_jet.mixers.registry import mixer_definition
from megatron_jet.model.param_table import layer_rows, mixer_rows, param_table
from megatron_jet.model.paths import Choices, insert_plan
from megatron_jet.model.state import load_tensors, local_keys


def initialize(chunks: list[nn.Module], model: ModelConfig, seed: int, choices: Choices | None = None) -> None:
    """Fill a model as Hugging Face does: matrices N(0, initializer_range), norms one, mixers by their own rule.

    In a supernet every path is drawn as if it were the layer plan's, so its start does not depend on the other paths.
    """
    held = local_keys(chunks)
    filled: set[str] = set()
    for layer in range(model.num_layers):
        if any(key.startswith(f"decoder.layers.{layer}.") for key in held):
            paths = [None] if choices is None else dict.fromkeys(weight_path(name) for name in choices[layer])
            for path in paths:
                tensors = random_layer(model, layer, seed, path)
                load_tensors(chunks, tensors, strict=False)
                filled |= set(tensors)
    generator = torch.Generator().manual_seed(seed)
    for row in param_table(model):
        if not row.key.startswith("decoder.layers."):
            shape = row.global_shape
            full = torch.ones(shape) if len(shape) == 1 else draw(shape, model.initializer_range, generator)
            filled.add(row.key)
            if row.key in held:
                load_tensors(chunks, {row.key: full}, strict=False)
    if held - filled:
        raise RuntimeError(f"no rule for the initial value of {sorted(held - filled)}")


def random_layer(model: ModelConfig, layer: int, seed: int, path: str | None = None) -> dict[str, Tensor]:
    """Random full tensors of one layer, by checkpoint key; with `path`, of a supernet's layer and this path of it."""
    if path is not None:
        plan = (*model.layer_plan[:layer], path, *model.layer_plan[layer + 1 :])
        model = model.with_plan(plan)
    generator = layer_generator(seed, layer)
    rows = layer_rows(model, layer)
    tensors = {}
    for row in rows:
        if ".self_attention." not in row.key:
            for name, shape in zip(row.hf, row.shapes, strict=True):
                ones = len(shape) == 1
                tensors[name] = torch.ones(shape) if ones else draw(shape, model.initializer_range, generator)
    mixer = mixer_from_scratch(model, model.layer_plan[layer], generator)
    tensors |= {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in mixer.items()}
    state = joined(rows, tensors, model)
    return state if path is None else insert_plan(state, model.layer_plan)


def mixer_from_scratch(model: ModelConfig, entry: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random full tensors of the mixer a plan entry names, by Hugging Face name relative to `self_attn.`."""
    return mixer_definition(split_entry(entry)[0]).init_random(model.mixer_of(entry), model, generator)


def mixer_from_teacher(
    model: ModelConfig, entry: str, teacher: AttentionWeights, generator: torch.Generator
) -> dict[str, Tensor]:
    """Full tensors of a linear mixer started from a softmax layer, by Hugging Face name relative to `self_attn.`."""
    definition = mixer_definition(split_entry(entry)[0])
    return definition.init_from_teacher(model.mixer_of(entry), model, teacher, generator)


def mixer_state(model: ModelConfig, entry: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by HF name -> by checkpoint key, both relative (`self_attn.` and `self_attention.` left out)."""
    rows = mixer_rows(model, entry)
    state = joined(rows, {f"self_attn.{name}": tensor for name, tensor in tensors.items()}, model)
    return {key.removeprefix("self_attention."): tensor for key, tensor in state.items()}


def attention_weights(model: ModelConfig, layer: int, hf_tensors: Mapping[str, Tensor]) -> AttentionWeights:
    """Q, K, V and O of a softmax layer out of a Hugging Face state dict."""
    q, k, v, o = (hf_tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkvo")
    return AttentionWeights(q, k, v, o, model.num_attention_heads, model.num_key_value_heads, model.head_dim)


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """One generator per layer, so that a pipeline stage draws only its own layers and still gets the same weights."""
    return torch.Generator().manual_seed(seed * 1_000_003 + layer + 1)


def joined(rows: list[ParamRow], tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Checkpoint tensors of some rows out of Hugging Face tensors."""
    return {row.key: join(row, [tensors[name] for name in row.hf], model) for row in rows}
