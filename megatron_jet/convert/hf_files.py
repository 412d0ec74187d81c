"""Safetensors of a Hugging Face directory: read and write them one tensor at a time.

The `safetensors` library writes a file from tensors that are all there. Here they are made one after another, so the
files are laid out first: 8 bytes with the header's length, the header (JSON: type, shape and place of each tensor),
then the data without gaps. Source of the format: github.com/huggingface/safetensors, README.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.convert.write_behind import write_behind

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_ALIGNMENT = 8  # of the data behind the header, so that every tensor starts at a multiple of its type's size


class HfTensors:
    """Read access to the tensors of a Hugging Face directory, by name.

    All headers are read and all file sizes checked at once; data only when asked for.

    Raises:
        UserError: no safetensors, a file that is missing, truncated or unreadable, a tensor that is there twice, an
            index that does not fit the files; the message names it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files: dict[str, Path] = {}
        self._stored_as: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        index = self.directory / INDEX
        places = _read_index(index) if index.is_file() else None
        for path in self._shards(places):
            _check_header(path)
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in self._files:
                        raise UserError(f"{path}: tensor '{name}' is in {self._files[name].name} as well")
                    piece = file.get_slice(name)
                    self._files[name] = path
                    self._headers[name] = (tuple(piece.get_shape()), piece.get_dtype())
        if places is not None:
            self._check_index(index, places)

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
                f"{self._files[name]}: tensor '{name}' has type {stored}; only {', '.join(DTYPES)} are read. Are the "
                "weights quantised? Dequantise them first"
            )
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU."""
        with _opened(self._files[name]) as file:
            return file.get_tensor(self._stored_as.get(name, name))

    def rename(self, stored: str, name: str) -> None:
        """Have a tensor of the files under another name from now on."""
        for tensors in (self._files, self._headers):
            tensors[name] = tensors.pop(stored)
        self._stored_as[name] = stored

    def _shards(self, places: dict[str, str] | None) -> list[Path]:
        single = self.directory / SINGLE
        if places is not None:
            paths = [self.directory / name for name in sorted(set(places.values()))]
            if single.is_file() and single not in paths:  # transformers would load it and not look at the index
                raise UserError(
                    f"{self.directory}: has {SINGLE} and an {INDEX} without it; remove the one that is not meant"
                )
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

    def _check_index(self, index: Path, places: dict[str, str]) -> None:
        for name, file in places.items():
            if self._files.get(name) != self.directory / file:
                raise UserError(f"{index}: tensor '{name}' is not in {file}")
        for name, path in self._files.items():
            if name not in places:
                raise UserError(f"{index}: tensor '{name}' of {path.name} is not listed")


@dataclass(frozen=True)
class OutTensor:
    """A tensor to write, made when it is written. `make` must give this shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_hf_tensors(directory: Path, tensors: list[OutTensor], shard_bytes: int) -> list[Path]:
    """Write safetensors, holding three tensors in memory at a time.

    Args:
        directory: an existing directory.
        tensors: in the order of the files.
        shard_bytes: a shard is closed before it would grow beyond this.

    Returns:
        The files written; with more than one there is an index among them.
    """
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    paths, weight_map = [], {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / name, shard)
        paths.append(directory / name)
        weight_map |= {t.name: name for t in shard}
    if len(shards) > 1:
        total = sum(t.bytes for t in tensors)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        paths.append(directory / INDEX)
    return paths


def _write_shard(path: Path, tensors: list[OutTensor]) -> None:
    """One file. Wide types come first, which keeps every tensor aligned; else the order is the caller's."""
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for t in tensors:
        start, end = end, end + t.bytes
        starts[t.name] = start
        header[t.name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    text = struct.pack("<Q", len(text)) + text
    with open(path, "wb", buffering=0) as file:
        handle = file.fileno()
        _write_at(handle, 0, memoryview(text))
        made = ((len(text) + starts[t.name], _bytes_of(t, t.make().contiguous())) for t in tensors)
        write_behind(made, lambda place_and_data: _write_at(handle, *place_and_data))


def _write_at(handle: int, place: int, data: memoryview) -> None:
    """All of the data, of which the system may take a part at a time (2 GiB at most)."""
    while data:
        written = os.pwrite(handle, data, place)
        place, data = place + written, data[written:]


def _bytes_of(t: OutTensor, tensor: Tensor) -> memoryview:
    if (tuple(tensor.shape), tensor.dtype) != (t.shape, t.dtype):
        raise ValueError(f"{t.name}: made {tuple(tensor.shape)} {tensor.dtype}, announced {t.shape} {t.dtype}")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _read_index(index: Path) -> dict[str, str]:
    """File name by tensor name."""
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index}: has no weight_map from tensor names to file names")
    return places


def _check_header(path: Path) -> None:
    """Raise UserError when a file is shorter than its header says, or names a tensor twice.

    The library would read the last of two. What else may be wrong with a file, the library says itself.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise _truncated(path, size)
        text = file.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise UserError(f"{path}: tensor '{name}' is there twice")
            found[name] = value
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        truncated = 8 + length + end > size
    except (ValueError, TypeError, AttributeError, LookupError):
        return
    if truncated:
        raise _truncated(path, size)


def _truncated(path: Path, size: int) -> UserError:
    return UserError(f"{path}: truncated safetensors ({size} bytes); download or copy it again")


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: unreadable safetensors ({error}); download or copy it again") from None
