"""A student's first weights, from the teacher's: mixers replaced, everything else taken over as it is."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_json
from megatron_jet.configs.layer_plan import LayerPlan, split_entry
from megatron_jet.configs.mixers.registry import LINEAR_MIXERS
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint, LazyTensor, write_checkpoint
from megatron_jet.mixers.choice import weight_path
from megatron_jet.mixers.layouts import split
from megatron_jet.mixers.params import AttentionWeights
from megatron_jet.model.initialize import mixer_from_scratch, mixer_from_teacher, mixer_state
from megatron_jet.model.param_table import mixer_rows, param_table
from megatron_jet.model.paths import Choices, extract_plan, supernet_key

Init = Literal["teacher", "random"]
DrawnMixer = Callable[[int, str], dict[str, Tensor]]  # of a layer, by key relative to the mixer


def make_student(
    teacher_checkpoint: str | Path,
    teacher: ModelConfig,
    student: ModelConfig,
    out: str | Path,
    *,
    seed: int,
    init: Init = "teacher",
    choices: Choices | None = None,
) -> None:
    """Write the checkpoint a student starts from. Needs no process group and does not depend on any layout.

    Softmax layers, MLPs, norms and embeddings are the teacher's. Each linear mixer is drawn from its own generator,
    seeded by (seed, layer, mixer): the same mixer starts the same in every student that has it at that layer.

    Args:
        teacher_checkpoint: model checkpoint of the teacher.
        teacher: its config.
        student: the student's config; its layer plan names the mixers.
        out: checkpoint directory to write.
        seed: of the drawn weights.
        init: linear mixers start from the teacher's Q, K, V and O, or at random.
        choices: for a supernet, the paths of each layer; keys then are those of model/paths.py.

    Raises:
        UserError: a student that does not fit the teacher, or a damaged teacher checkpoint.
    """
    _check_fit(teacher, student)
    source = GlobalCheckpoint(teacher_checkpoint)
    drawn = _drawn_mixer(source, teacher, student, seed, init)
    tensors: dict[str, LazyTensor] = {}
    for row in param_table(student):
        if ".self_attention." not in row.key:
            tensors[row.key] = source.lazy(row.key)
    for layer in range(student.num_layers):
        paths = (student.layer_plan[layer],) if choices is None else choices[layer]
        for path in dict.fromkeys(weight_path(entry) for entry in paths):
            for key, tensor in _mixer(source, student, layer, path, drawn).items():
                key = f"decoder.layers.{layer}.{key}"
                tensors[key if choices is None else supernet_key(key, path)] = tensor
    write_checkpoint(out, tensors, student.to_dict())


def extract_student(supernet_checkpoint: str | Path, student: ModelConfig, out: str | Path) -> None:
    """Write the plain checkpoint of one model inside a supernet: `student.layer_plan` picks a path per layer."""
    source = GlobalCheckpoint(supernet_checkpoint)
    tensors: Mapping[str, LazyTensor] = {key: source.lazy(key) for key in source}
    write_checkpoint(out, extract_plan(tensors, student.layer_plan), student.to_dict())


def _mixer(
    source: GlobalCheckpoint, student: ModelConfig, layer: int, entry: str, drawn: DrawnMixer
) -> dict[str, LazyTensor]:
    """Tensors of one layer's mixer, by checkpoint key relative to the layer."""
    rows = mixer_rows(student, entry)
    if split_entry(entry)[0] not in LINEAR_MIXERS:
        return {row.key: source.lazy(f"decoder.layers.{layer}.{row.key}") for row in rows}

    def take(key: str) -> Callable[[], Tensor]:
        return lambda: drawn(layer, entry)[key.removeprefix("self_attention.")]

    # In fp32 whatever the teacher's type: these tensors train, and the loader casts to the model's own type.
    return {row.key: LazyTensor(row.global_shape, torch.float32, take(row.key)) for row in rows}


def _drawn_mixer(
    source: GlobalCheckpoint, teacher: ModelConfig, student: ModelConfig, seed: int, init: Init
) -> DrawnMixer:
    """Draws a layer's mixer. Keeps the last one only: its tensors are written one after another."""

    @lru_cache(maxsize=1)
    def drawn(layer: int, entry: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(hash_json([seed, layer, entry])[:15], 16))
        if init == "random":
            tensors = mixer_from_scratch(student, entry, generator)
        else:
            tensors = mixer_from_teacher(student, entry, _attention(source, teacher, layer), generator)
        return mixer_state(student, entry, tensors)

    return drawn


def _attention(source: GlobalCheckpoint, teacher: ModelConfig, layer: int) -> AttentionWeights:
    """The teacher's Q, K, V and O of one layer, in fp32."""
    tensors: dict[str, Tensor] = {}
    for row in mixer_rows(teacher, teacher.layer_plan[layer]):
        if row.key.endswith(("linear_qkv.weight", "linear_proj.weight")):
            full = source.read(f"decoder.layers.{layer}.{row.key}").float()
            tensors |= dict(zip(row.hf, split(row, full, teacher), strict=True))
    q, k, v, o = (tensors[f"self_attn.{name}_proj.weight"] for name in "qkvo")
    return AttentionWeights(q, k, v, o, teacher.num_attention_heads, teacher.num_key_value_heads, teacher.head_dim)


def _check_fit(teacher: ModelConfig, student: ModelConfig) -> None:
    """What is not a mixer is taken over, so it must have the same sizes."""
    own = {"layer_plan", "mixers", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    for name in type(teacher).model_fields:
        if name not in own and getattr(teacher, name) != getattr(student, name):
            raise UserError(
                f"student has {name}={getattr(student, name)}, the teacher {getattr(teacher, name)}; they must be equal"
            )
    if any(split_entry(entry)[0] in LINEAR_MIXERS for entry in teacher.layer_plan):
        raise UserError("the teacher has linear layers; PostNAS starts from a full-attention model")


def student_plan(plan: LayerPlan, linear: str) -> LayerPlan:
    """The plan with another linear mixer in every linear layer."""
    return tuple(linear if split_entry(entry)[0] in LINEAR_MIXERS else entry for entry in plan)
