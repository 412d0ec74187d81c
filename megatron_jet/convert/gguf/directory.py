"""A GGUF file as a Hugging Face directory, whole or not at all."""

import json
from pathlib import Path
from typing import Any

from megatron_jet.configs.directories import replaced_directory
from megatron_jet.convert.companions import CARD
from megatron_jet.convert.gguf.model import GgufModel
from megatron_jet.convert.gguf.tokenizer import write_tokenizer
from megatron_jet.convert.hf_files import OutTensor, write_hf_tensors

SUFFIX = ".gguf"
SHARD_BYTES = 4 << 30
_ORIGIN = tuple(f"general.{key}" for key in ("source.repo_url", "source.url", "repo_url", "url"))


def write_companions(model: GgufModel, directory: Path) -> None:
    """config.json, the tokenizer's files and a card into an existing or new directory."""
    directory.mkdir(exist_ok=True)
    text = json.dumps(model.config, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    write_tokenizer(model.file.fields, directory, model.directory)
    (directory / CARD).write_text(card(model), encoding="utf-8")


def card(model: GgufModel, source: str | None = None) -> str:
    """README.md of a directory made from a GGUF file: where it comes from, its licence, and how its weights were kept.

    Args:
        source: where the file comes from, when it does not say so itself.
    """
    fields = model.file.fields
    name = fields.get("general.name") or model.directory.stem
    licence = fields.get("general.license")
    origin = source or next((fields[key] for key in _ORIGIN if fields.get(key)), None)
    kinds = sorted({entry.kind for entry in model.file.tensors.values()})
    lines = ["---", f"license: {licence}", "---", ""] if licence else []
    lines += [f"# {name}", "", f"Made from the GGUF file `{model.directory.name}`."]
    if origin:
        lines += ["", f"Source: {origin}"]
    lines += ["", f"Licence: {licence or 'the file names none'}", ""]
    kept = "Quantised weights were restored to fp32" if model.file.quantised else "Weights are as they were stored"
    return "\n".join([*lines, f"{kept} (types in the file: {', '.join(kinds)}).", ""])


def gguf_to_hf(path: str | Path, out: str | Path, *, extra: dict[str, Any] | None = None) -> Path:
    """Write the Hugging Face directory `out` of a GGUF file, tensor by tensor.

    Args:
        path: the file.
        out: directory to make; one that is there is replaced.
        extra: texts of more files by name (a licence, say, or another card).

    Raises:
        UserError: what `GgufModel` and `write_tokenizer` raise, or `out` cannot be written.
    """
    model = GgufModel(path)
    out = Path(out)
    with replaced_directory(out) as directory:
        write_companions(model, directory)
        for name, text in (extra or {}).items():
            (directory / name).write_text(text, encoding="utf-8")
        tensors = [
            OutTensor(name, model.shape(name), model.dtype(name), lambda name=name: model.read(name)) for name in model
        ]
        write_hf_tensors(directory, tensors, SHARD_BYTES)
    return out
