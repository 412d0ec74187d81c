"""Megatron checkpoint -> Hugging Face directory, tensor by tensor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_jet.configs.directories import replaced_directory
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_text
from megatron_jet.configs.hf_format import HYBRIDS, model_from_hf, model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.companions import CARD, COMPANIONS, TOKENIZERS, check_inside, copy_companions
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint, check_whole
from megatron_jet.convert.hf_files import OutTensor, write_hf_tensors
from megatron_jet.convert.hf_import import finite
from megatron_jet.convert.hf_package import auto_map, write_modeling_code
from megatron_jet.convert.model_card import model_card
from megatron_jet.convert.outputs import check_output, not_an_export
from megatron_jet.convert.progress import ConversionProgress
from megatron_jet.convert.weights import split_row
from megatron_jet.mixers.params import ParamRow
from megatron_jet.model.param_table import param_table

Dtype = Literal["stored", "fp32", "bf16"]
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: Dtype = "stored",
    shard_bytes: int = 4 << 30,
    force: bool = False,
    companions: str | Path | None = None,
    card: str | None = None,
    command: str | None = None,
    progress: ConversionProgress | None = None,
) -> ModelConfig:
    """Convert a Megatron checkpoint to a Hugging Face directory that loads by itself, modeling code included.

    Args:
        checkpoint: model checkpoint of any layout with model_config.json beside the weights.
        out: directory to make.
        dtype: type of the weights; "stored" keeps every tensor's own. A_log stays in fp32 always.
        shard_bytes: largest size of one safetensors file, unless a single tensor is larger.
        force: replace an existing `out`.
        companions: directory with the tokenizer's files; None: those kept at import, if any.
        card: text of README.md; None: the one kept at import if the model is still that one, else a short one.
        command: the short one's, if it is to name one.
        progress: told of every tensor.

    Returns:
        The model's config.

    Raises:
        UserError: an incomplete checkpoint, a missing, extra, mis-shaped or non-finite tensor, or an existing `out`.
            Nothing is left half-written.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_output(out, checkpoint, force, not_an_export)
    if companions is not None:
        _check_tokenizer(Path(companions))
    if shard_bytes <= 0:
        raise UserError(f"size of a shard is {shard_bytes} bytes; give a number above 0")
    check_whole(checkpoint)
    model = checkpoint_config(checkpoint)  # first: it says better what is wrong with a config than its checksum does
    source = GlobalCheckpoint(checkpoint)
    rows = param_table(model)
    check_keys(model, rows, source)
    tensors = hf_tensors(rows, source, model, dtype)
    if progress is not None:
        tensors = [progress.watched(tensor) for tensor in tensors]
    within = checkpoint if companions is None else None
    companions = Path(companions) if companions is not None else checkpoint / COMPANIONS
    with replaced_directory(out, lambda: check_output(out, checkpoint, force, not_an_export)) as temporary:
        write_hf_tensors(temporary, tensors, shard_bytes)
        if companions.is_dir():
            copy_companions(companions, temporary, skip=("config.json", CARD), within=within)
        _write_config(temporary / "config.json", model, checkpoint, _main_dtype(source, rows, dtype))
        kept = _kept_card(model, checkpoint) if card is None else None
        if kept is not None:
            (temporary / CARD).write_bytes(kept)
        else:
            write_text(temporary / CARD, card or model_card(model, command=command))
        if _is_hybrid(temporary):
            write_modeling_code(temporary)
    return model


def _check_tokenizer(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; give one with the tokenizer's files")
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{directory}: holds no tokenizer ({', '.join(TOKENIZERS)}); give a directory with its files")


def checkpoint_config(checkpoint: str | Path) -> ModelConfig:
    """ModelConfig kept beside a checkpoint's weights. Raises UserError when it is missing."""
    path = Path(checkpoint) / "model_config.json"
    if not path.is_file():
        raise UserError(
            f"{path} is missing; it says what model the weights belong to (tools/convert.py import writes it)"
        )
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds no mapping of settings")
    return ModelConfig.parse({key: stored[key] for key in stored if key != "schema_version"}, str(path))


def check_keys(model: ModelConfig, rows: list[ParamRow], source: GlobalCheckpoint) -> None:
    """Raise UserError when the checkpoint's tensors are not those of the model."""
    expected = {row.key: row.global_shape for row in rows}
    missing = [key for key in expected if key not in source]
    extra = [key for key in source if key not in expected and not key.startswith(("optimizer.", "chained_"))]
    for what, keys in (("missing", missing), ("not part of the model", extra)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"{source.path}: tensors {what}: {', '.join(sorted(keys)[:3])}{more}")
    for key, shape in expected.items():
        if source.shape(key) != shape:
            raise UserError(
                f"{source.path}: tensor '{key}' has shape {list(source.shape(key))}, the model needs {list(shape)}"
            )


def hf_tensors(rows: list[ParamRow], source: GlobalCheckpoint, model: ModelConfig, dtype: Dtype) -> list[OutTensor]:
    """What an export holds, in order; a tensor is read when it is made."""
    view = _HfView(source, model)
    return [tensor for row in rows for tensor in _out_tensors(row, view, source, dtype)]


class _HfView:
    """A checkpoint's tensors by Hugging Face name. Keeps the parts of a row, which are asked for one after another."""

    def __init__(self, source: GlobalCheckpoint, model: ModelConfig):
        self._source, self._model = source, model
        self._key: str | None = None
        self._parts: dict[str, Tensor] = {}

    def read(self, row: ParamRow, name: str) -> Tensor:
        """One Hugging Face tensor of a row, in the checkpoint's type."""
        if self._key != row.key:
            self._parts = {}  # let go of the last row before the next one is read
            full = finite(self._source.read(row.key), row.key, self._source.path)
            self._parts, self._key = split_row(row, full, self._model), row.key
        return self._parts[name]


def _out_tensors(row: ParamRow, view: _HfView, source: GlobalCheckpoint, dtype: Dtype) -> list[OutTensor]:
    """A row's Hugging Face tensors."""
    kept = dtype == "stored" or row.dtype is not None
    target = source.dtype(row.key) if kept else TORCH_DTYPES[dtype]

    def maker(name: str):
        return lambda: view.read(row, name).to(target)

    return [OutTensor(name, shape, target, maker(name)) for name, shape in zip(row.hf, row.shapes, strict=True)]


def _main_dtype(source: GlobalCheckpoint, rows: list[ParamRow], dtype: Dtype) -> str:
    """As config.json names it: the type of the embedding stands for the model."""
    target = source.dtype(rows[0].key) if dtype == "stored" else TORCH_DTYPES[dtype]
    return str(target).removeprefix("torch.")


def _is_imported(model: ModelConfig, checkpoint: Path) -> bool:
    """Is this still the model whose config.json was kept at import?"""
    original = checkpoint / COMPANIONS / "config.json"
    return original.is_file() and model_from_hf(read_json(original), str(original)) == model


def _kept_card(model: ModelConfig, checkpoint: Path) -> bytes | None:
    """README.md of the import, if this is still its model. As bytes: what it holds is not ours."""
    path = checkpoint / COMPANIONS / CARD
    if not path.is_file() or not _is_imported(model, checkpoint):
        return None
    check_inside(path, checkpoint)
    return path.read_bytes()


def _write_config(path: Path, model: ModelConfig, checkpoint: Path, dtype: str) -> None:
    """The config.json of the import where it still describes the model, else one written from the ModelConfig.

    The first keeps what we do not model, such as norm_eps written as a string, byte for byte.
    """
    config, original = model_to_hf(model, dtype), None
    if _is_imported(model, checkpoint):
        original = (checkpoint / COMPANIONS / "config.json").read_bytes()
        config = json.loads(original)
    changes = {}
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(dtype_key, dtype) != dtype:
        changes[dtype_key] = dtype
    if config["model_type"] in HYBRIDS and config.get("auto_map") != auto_map(config["model_type"]):
        changes["auto_map"] = auto_map(config["model_type"])
    if original is not None and not changes:
        path.write_bytes(original)
    else:
        write_text(path, _dump({**config, **changes}))


def _dump(config: Mapping) -> str:
    return json.dumps(config, indent=2) + "\n"


def _is_hybrid(directory: Path) -> bool:
    return read_json(directory / "config.json")["model_type"] in HYBRIDS
