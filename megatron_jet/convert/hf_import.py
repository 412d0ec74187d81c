"""Hugging Face directory or GGUF file -> Megatron checkpoint, tensor by tensor."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.configs.hf_format import model_from_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.companions import COMPANIONS, copy_companions
from megatron_jet.convert.gguf.directory import SUFFIX, write_companions
from megatron_jet.convert.gguf.model import GgufModel
from megatron_jet.convert.global_checkpoint import LazyTensor, write_checkpoint
from megatron_jet.convert.hf_files import HfTensors
from megatron_jet.convert.outputs import check_output, not_an_import
from megatron_jet.convert.progress import ConversionProgress
from megatron_jet.mixers.layouts import join
from megatron_jet.mixers.params import ParamRow
from megatron_jet.model.param_table import param_table

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Parts of tensor names that tell what a file is that is no plain model's.
UNFINISHED = {
    (".lora_A.", ".lora_B.", ".base_layer.", ".base_model."): "an adapter is not merged; merge it into the model first",
    (
        (".qweight.", ".qzeros.", ".g_idx.", ".weight_scale.", ".weight_scale_inv.", ".weight_packed.", ".absmax.")
        + (".SCB.", ".quant_map.", ".scales.", ".biases.", ".input_scale.", ".weight_zero_point.")
    ): "the weights are quantised; dequantise them first",
    (".module.", "._orig_mod."): "these are names of a wrapped model; save the model inside the wrapper",
    ("^.embed_tokens.",): "this is a bare base model; save the model with its language-modelling head",
}


class TensorSource(Protocol):
    """What a checkpoint is made from: tensors by Hugging Face name, read one at a time."""

    directory: Path  # of the files, for messages

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...


def import_hf(
    hf_dir: str | Path, out: str | Path, *, force: bool = False, progress: ConversionProgress | None = None
) -> ModelConfig:
    """Convert a Hugging Face checkpoint. Needs memory for three tensors at a time.

    The checkpoint keeps the type of every tensor, config.json and the tokenizer's files, so that `export_hf` gives the
    same model back bit by bit.

    Args:
        hf_dir: Qwen2, Qwen3, Llama, jet_nemotron or megatron_jet model with safetensors; or a GGUF file of one of the
            first three.
        out: checkpoint directory to make.
        force: replace an existing `out`.
        progress: told of every tensor.

    Returns:
        The model's config.

    Raises:
        UserError: an unsupported model, a missing, extra, mis-shaped or non-finite tensor, a damaged file, or an
            existing `out`. Nothing is left half-written.
    """
    hf_dir, out = Path(hf_dir), Path(out)
    check_output(out, hf_dir, force, not_an_import)
    source, model, companions = _opened(hf_dir)
    rows = param_table(model)
    check_tensors(model, rows, source)
    tensors = {row.key: _lazy(row, source, model) for row in rows}
    if progress is not None:
        tensors = {key: progress.watched(tensor) for key, tensor in tensors.items()}
    write_checkpoint(
        out,
        tensors,
        model.to_dict(),
        lambda directory: companions(directory / COMPANIONS),
        lambda: check_output(out, hf_dir, force, not_an_import),
    )
    return model


def _opened(path: Path) -> tuple[TensorSource, ModelConfig, Callable[[Path], None]]:
    """(Tensors, the model, what writes the files beside the weights) of a Hugging Face directory or a GGUF file."""
    if path.suffix == SUFFIX:
        gguf = GgufModel(path)
        return gguf, model_from_hf(gguf.config, str(path)), lambda directory: write_companions(gguf, directory)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give a Hugging Face model directory or a {SUFFIX} file")
    config_path = path / "config.json"
    model = model_from_hf(read_json(config_path), str(config_path))
    return weights_of(path, model), model, lambda directory: copy_companions(path, directory)


def weights_of(hf_dir: Path, model: ModelConfig) -> HfTensors:
    """The weights of a model's directory; a tied embedding that was saved as the head only goes by its own name."""
    source = HfTensors(hf_dir)
    if model.tie_word_embeddings and EMBEDDING not in source and HEAD in source:
        source.rename(HEAD, EMBEDDING)
    return source


def check_tensors(model: ModelConfig, rows: list[ParamRow], source: TensorSource) -> None:
    """Raise UserError when names, shapes or types in the files are not those of the model."""
    expected = {name: shape for row in rows for name, shape in zip(row.hf, row.shapes, strict=True)}
    missing = [name for name in expected if name not in source]
    extra = [name for name in source if name not in expected and not _harmless(name, model, source)]
    if missing or extra:
        parts = [_named("missing", missing), _named("not part of the model", extra), _likely_reason(extra)]
        raise UserError(f"{source.directory}: " + "; ".join(part for part in parts if part))
    for row in rows:
        for name, shape in zip(row.hf, row.shapes, strict=True):
            if source.shape(name) != shape:
                raise UserError(
                    f"{source.directory}: tensor '{name}' has shape {list(source.shape(name))}, "
                    f"the model needs {list(shape)}"
                )
        if len({source.dtype(name) for name in row.hf}) > 1:
            raise UserError(
                f"{source.directory}: tensors {', '.join(row.hf)} have different types; they are fused into one"
            )


def finite(tensor: Tensor, name: str, where: str | Path) -> Tensor:
    """The tensor. Raises UserError when it holds NaN or infinity.

    Either shows in the smallest and the largest value (NaN is passed on). They are found in one pass without a copy,
    where `isfinite` makes several temporary tensors as large as this one.
    """
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise UserError(f"{where}: tensor '{name}' holds NaN or infinite values")
    return tensor


def _lazy(row: ParamRow, source: TensorSource, model: ModelConfig) -> LazyTensor:
    def make() -> Tensor:
        return join(row, [finite(source.read(name), name, source.directory) for name in row.hf], model)

    return LazyTensor(row.global_shape, source.dtype(row.hf[0]), make)


def _harmless(name: str, model: ModelConfig, source: TensorSource) -> bool:
    """Buffers that old files hold, and a tied LM head written out although it is the embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name != "lm_head.weight" or not model.tie_word_embeddings:
        return False
    embedding = EMBEDDING
    if embedding in source and not torch.equal(source.read(name), source.read(embedding)):
        raise UserError(f"{source.directory}: tie_word_embeddings is true but lm_head.weight differs from {embedding}")
    return True


def _likely_reason(extra: list[str]) -> str:
    """What tensors that no plain model has usually mean, and what to do; empty for others."""
    for parts, what in UNFINISHED.items():
        if any(part in f"^.{name}." for name in extra for part in parts):
            return what
    return ""


def _named(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {what}: {', '.join(sorted(names)[:3])}{more}"
