"""Safetensors of a Hugging Face directory: read one tensor at a time, write shard by shard."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class HfTensors:
    """Read access to the tensors of a Hugging Face directory, by name.

    All headers are read and all file sizes checked at once; data only when asked for.

    Raises:
        UserError: no safetensors, a file that is missing, truncated or unreadable; the message names it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in self._shards():
            _check_size(path)
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    piece = file.get_slice(name)
                    self._files[name] = path
                    self._headers[name] = (tuple(piece.get_shape()), piece.get_dtype())
        self._check_index()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for a type that is not a floating-point type of weights (quantised files, say)."""
        stored = self._headers[name][1]
        if stored not in DTYPES:
            raise UserError(
                f"{self._files[name]}: tensor '{name}' has type {stored}; only {', '.join(DTYPES)} are read"
            )
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        with _opened(self._files[name]) as file:
            return file.get_tensor(name)

    def _shards(self) -> list[Path]:
        index, single = self.directory / INDEX, self.directory / SINGLE
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            paths = [self.directory / name for name in names]
        elif single.is_file():
            paths = [single]
        else:
            raise UserError(
                f"{self.directory}: no {SINGLE} and no {INDEX}; give a Hugging Face directory with safetensors"
            )
        for path in paths:
            if not path.is_file() or path.parent != self.directory:
                raise UserError(f"{path}: no such file, but {INDEX} names it")
        return paths

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if index.is_file():
            for name, file in read_json(index).get("weight_map", {}).items():
                if self._files.get(name) != self.directory / file:
                    raise UserError(f"{index}: tensor '{name}' is not in {file}")


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write, made when its shard is."""

    name: str
    bytes: int
    make: Callable[[], Tensor]


def write_hf_tensors(directory: Path, tensors: list[OutTensor], shard_bytes: int) -> list[Path]:
    """Write safetensors, holding one shard in memory at a time.

    Args:
        directory: an existing directory.
        tensors: in the order of the files.
        shard_bytes: a shard is closed before it would grow beyond this.

    Returns:
        The files written; with more than one there is an index among them.
    """
    shards: list[list[OutTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    paths, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A copy gives each tensor storage of its own, as the format demands.
        save_file({t.name: t.make().contiguous().clone() for t in shard}, directory / name, metadata={"format": "pt"})
        paths.append(directory / name)
        weight_map |= {t.name: name for t in shard}
    if len(shards) > 1:
        total = sum(t.bytes for t in tensors)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        paths.append(directory / INDEX)
    return paths


def _check_size(path: Path) -> None:
    """A safetensors file says in its header how long it is."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    if len(start) < 8 or 8 + struct.unpack("<Q", start)[0] > size:
        raise UserError(f"{path}: truncated safetensors ({size} bytes); download or copy it again")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        what = "truncated" if "Incomplete" in str(error) else "unreadable"
        raise UserError(f"{path}: {what} safetensors ({error}); download or copy it again") from None
