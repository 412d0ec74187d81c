"""Hugging Face directory -> Megatron checkpoint, tensor by tensor."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.configs.hf_format import model_from_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.global_checkpoint import COMPLETE_MARK, LazyTensor, write_checkpoint
from megatron_jet.convert.hf_files import HfTensors
from megatron_jet.convert.progress import ConversionProgress
from megatron_jet.mixers.layouts import join
from megatron_jet.mixers.params import ParamRow
from megatron_jet.model.param_table import param_table

COMPANIONS = "hf"  # folder beside the weights with config.json, tokenizer and the like, as they were

# Names of the files that make a tokenizer and a config, and of the texts that must travel with a model.
COMPANION_STEMS = (
    "config",
    "generation_config",
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "chat",
)
TEXTS = ("README.md", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def import_hf(
    hf_dir: str | Path, out: str | Path, *, force: bool = False, progress: ConversionProgress | None = None
) -> ModelConfig:
    """Convert a Hugging Face checkpoint. Needs memory for two or three tensors at a time.

    The checkpoint keeps the type of every tensor, config.json and the tokenizer's files, so that `export_hf` gives the
    same model back bit by bit.

    Args:
        hf_dir: Qwen2, Qwen3, Llama, jet_nemotron or megatron_jet model with safetensors.
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
    check_output(out, hf_dir, force, COMPLETE_MARK)
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: no such directory; give a Hugging Face model directory")
    config_path = hf_dir / "config.json"
    model = model_from_hf(read_json(config_path), str(config_path))
    source = HfTensors(hf_dir)
    rows = param_table(model)
    check_tensors(model, rows, source)
    tensors = {row.key: _lazy(row, source, model) for row in rows}
    if progress is not None:
        tensors = {key: progress.watched(tensor) for key, tensor in tensors.items()}
    write_checkpoint(out, tensors, model.to_dict(), lambda directory: copy_companions(hf_dir, directory / COMPANIONS))
    return model


def check_output(path: Path, source: Path, force: bool, mark: str) -> None:
    """Raise UserError when an output is there already and may not be replaced.

    Args:
        path: the output directory.
        source: what is read.
        force: the user wants an earlier output replaced.
        mark: file that every such output has; `force` removes nothing else than these.
    """
    if source.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{path}: the output would replace the input {source}; choose another output")
    if not path.exists():
        return
    if not force:
        raise UserError(f"{path} exists; choose another output or pass --force to replace it")
    if not path.is_dir() or (any(path.iterdir()) and not (path / mark).is_file()):
        raise UserError(f"{path} is not an earlier output (it has no {mark}); --force replaces nothing else")


def check_tensors(model: ModelConfig, rows: list[ParamRow], source: HfTensors) -> None:
    """Raise UserError when names, shapes or types in the files are not those of the model."""
    expected = {name: shape for row in rows for name, shape in zip(row.hf, row.shapes, strict=True)}
    missing = [name for name in expected if name not in source]
    extra = [name for name in source if name not in expected and not _harmless(name, model, source)]
    if missing or extra:
        parts = [_named("missing", missing), _named("not part of the model", extra)]
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


def _lazy(row: ParamRow, source: HfTensors, model: ModelConfig) -> LazyTensor:
    def make() -> Tensor:
        return join(row, [finite(source.read(name), name, source.directory) for name in row.hf], model)

    return LazyTensor(row.global_shape, source.dtype(row.hf[0]), make)


def _harmless(name: str, model: ModelConfig, source: HfTensors) -> bool:
    """Buffers that old files hold, and a tied LM head written out although it is the embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name != "lm_head.weight" or not model.tie_word_embeddings:
        return False
    embedding = "model.embed_tokens.weight"
    if embedding in source and not torch.equal(source.read(name), source.read(embedding)):
        raise UserError(f"{source.directory}: tie_word_embeddings is true but lm_head.weight differs from {embedding}")
    return True


def _named(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {what}: {', '.join(sorted(names)[:3])}{more}"


def copy_companions(source: Path, out: Path, skip: tuple[str, ...] = ()) -> None:
    """Copy config, tokenizer files, card and licence; weights, code and what else lies beside them stay."""
    out.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        text = path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken")
        named = path.name.startswith(COMPANION_STEMS) or path.suffix in (".model", ".tiktoken")
        legal = path.name.startswith(TEXTS) and path.suffix in ("", ".md", ".txt")
        if path.is_file() and (legal or (text and named)) and path.name not in skip:
            shutil.copyfile(path, out / path.name)
