"""Reading checkpoints of strangers: nothing that is pickled in them runs.

torch keeps a checkpoint's index as a pickle (.metadata) and loads plain values from the data files with an open
unpickler. Here both know the classes that checkpoints hold, and refuse everything else.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_jet.configs.errors import UserError

# Calling any of these with any arguments makes a plain value and touches nothing.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING", "TensorProperties"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "collections": ("OrderedDict",),
    "builtins": ("set", "frozenset"),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePath", "PurePosixPath"),
}
# torch.load obeys the first wherever it is called, and refuses to work with both.
_FORCED = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


class _ClosedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = name in _KNOWN.get(module, ())
        if module == "torch" and not known:
            known = isinstance(getattr(torch, name, None), torch.dtype | torch.memory_format | torch.layout)
        if not known:
            raise UserError(f"holds {module}.{name}, which no checkpoint needs and which might run code; refused")
        return super().find_class(module, name)


def read_metadata(path: str | Path) -> Metadata:
    """The index of a torch checkpoint.

    Args:
        path: its .metadata file.

    Raises:
        UserError: it holds anything but the index of a checkpoint in this directory.
        Exception: of many kinds, for a damaged one.
    """
    with open(path, "rb") as file:
        metadata = _ClosedUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise UserError(f"holds a {type(metadata).__name__}, not the index of a checkpoint")
    for place in (metadata.storage_data or {}).values():
        file_name = Path(str(place.relative_path))
        if file_name.is_absolute() or ".." in file_name.parts:
            raise UserError(f"names the file {file_name}, which lies outside the checkpoint")
    return metadata


@contextmanager
def closed_pickles() -> Iterator[None]:
    """Inside, torch and Megatron read checkpoints without running anything that is pickled in them."""

    def closed(reader: FileSystemReader, *args: Any, rank: int | None = None, **kwargs: Any) -> Metadata:
        metadata = read_metadata(reader._get_metadata_path(rank))
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = reader.load_id
        return metadata

    open_reader = FileSystemReader.read_metadata
    environment = {name: os.environ.get(name) for name in _FORCED}
    FileSystemReader.read_metadata = closed
    os.environ.update(_FORCED)
    try:
        yield
    finally:
        FileSystemReader.read_metadata = open_reader
        for name, value in environment.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
