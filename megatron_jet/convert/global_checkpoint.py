"""A Megatron checkpoint (torch_dist) as a set of whole tensors by key: read one, write one, never all at once.

Conversion and student initialisation work on whole tensors and need no model, no GPU and no process group. What is
written here loads at any tensor- and pipeline-parallel layout, as a checkpoint saved by Megatron does.
"""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_jet.configs.checksums import DamagedError, files_in, hash_files, verify, write_checksums
from megatron_jet.configs.directories import interrupted, one_line, replaced_directory, stop_if_interrupted
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_json
from megatron_jet.convert.write_behind import write_behind
from megatron_jet.model.closed_pickle import closed_pickles, read_metadata

COMPLETE_MARK = "metadata.json"  # Megatron's own; written last, so that a directory without it is unfinished
COMMON_STATE = "common_state/shard_0_1"  # Megatron's place for everything that is not a tensor: nothing here
# Below this size one file holds everything; above, one file per tensor: the writer keeps a file's tensors alive.
SINGLE_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, and dropped afterwards."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _Reader(FileSystemReader):
    """Torch's reader, which otherwise unpickles the metadata of the whole checkpoint for every tensor that is read."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def check_whole(path: Path) -> None:
    """Raise UserError unless a directory looks like a finished checkpoint."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint directory")
    if not (path / COMPLETE_MARK).is_file() or not (path / ".metadata").is_file():
        raise UserError(f"{path}: not a complete Megatron checkpoint ({COMPLETE_MARK} or .metadata is missing)")


class GlobalCheckpoint:
    """Read access to the whole tensors of a checkpoint directory.

    Raises:
        UserError: no such directory, one that is not a complete Megatron checkpoint, or one whose files are not those
            that were written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check_whole(self.path)
        verify(self.path)
        try:
            metadata = read_metadata(self.path / ".metadata")
        except Exception as error:
            raise DamagedError(f"{path}: checkpoint metadata cannot be read ({one_line(error)})", self.path) from None
        self._reader = _Reader(self.path, metadata)
        self._places = metadata.storage_data
        self._entries = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._entry(key).properties.dtype

    def read(self, key: str) -> Tensor:
        """One whole tensor on the CPU, not to be written to. Raises UserError for an unknown key or a damaged file."""
        path = self._file_of(key)
        if path is None:
            return self.read_many([key])[key]
        try:
            tensor = torch.load(path, mmap=True, weights_only=True)
        except Exception as error:
            stop_if_interrupted(error)
            tensor = None
        if tensor is None or (tuple(tensor.shape), tensor.dtype) != (self.shape(key), self.dtype(key)):
            raise DamagedError(f"{self.path}: cannot read {key}; the checkpoint is damaged", self.path)
        return tensor

    def read_many(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Some whole tensors on the CPU, by key."""
        tensors = {key: torch.empty(self.shape(key), dtype=self.dtype(key)) for key in keys}
        try:
            with _without_process_group(), closed_pickles():
                dcp.load(dict(tensors), storage_reader=self._reader, no_dist=True)
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is not an Exception
            stop_if_interrupted(error)
            names = ", ".join(list(tensors)[:3])
            raise DamagedError(f"{self.path}: cannot read {names}; the checkpoint is damaged", self.path) from None
        return tensors

    def lazy(self, key: str) -> LazyTensor:
        return LazyTensor(self.shape(key), self.dtype(key), lambda: self.read(key))

    def _file_of(self, key: str) -> Path | None:
        """The file that holds this tensor whole and nothing else, as `write_checkpoint` makes them for large models.

        Such a file can be mapped, which spares two copies. None: read it the general way.
        """
        chunks = self._entry(key).chunks
        place = self._places.get(MetadataIndex(key, chunks[0].offsets)) if len(chunks) == 1 else None
        if place is None or place.offset != 0:
            return None
        path = self.path / place.relative_path
        return path if path.is_file() and path.stat().st_size == place.length else None

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self._entries:
            raise UserError(f"{self.path}: checkpoint has no tensor '{key}'")
        return self._entries[key]


class _LazyPlanner(DefaultSavePlanner):
    """Plans with tensors on the meta device and has each one made when it is written."""

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        key = write_item.index.fqn
        if key == COMMON_STATE:
            return _serialized([{}])
        lazy = self._tensors[key]
        tensor = lazy.make().detach().to("cpu", lazy.dtype).contiguous()
        if tuple(tensor.shape) != lazy.shape:
            raise ValueError(f"{key}: made a tensor of shape {tuple(tensor.shape)}, announced {lazy.shape}")
        return tensor


@dataclass(frozen=True)
class _Made:
    """Stands for the planner where the one item of a file is made already."""

    data: Tensor | io.BytesIO

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self.data


class _Writer(FileSystemWriter):
    """Writes files of one tensor each side by side. Torch's own threads lose the errors that happen in them."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if self.single_file_per_rank:
            return super().write_data(plan, planner)
        write = super().write_data
        prefix = plan.storage_data.prefix
        files = (
            (replace(plan, items=[item], storage_data=replace(plan.storage_data, prefix=f"{prefix}{number}_")), item)
            for number, item in enumerate(plan.items)
        )
        made = ((file, _Made(planner.resolve_data(item))) for file, item in files)
        written = write_behind(made, lambda file_and_data: write(*file_and_data).wait())
        results: Future[list[WriteResult]] = Future()
        results.set_result([result for file in written for result in file])
        return results


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, LazyTensor | Tensor],
    model_config: dict | None = None,
    add_files: Callable[[Path], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a complete checkpoint, or nothing: a temporary directory beside `path` is renamed at the end.

    Args:
        path: directory to make; an existing one is replaced.
        tensors: whole tensors by checkpoint key.
        model_config: kept beside the weights as model_config.json.
        add_files: called with the temporary directory to put more files beside the weights.
        check: called once no other process can make `path` any more; may raise.
    """
    lazy = {key: LazyTensor.of(t) if isinstance(t, Tensor) else t for key, t in tensors.items()}
    with replaced_directory(path, check) as temporary:
        single = sum(t.bytes for t in lazy.values()) <= SINGLE_FILE_BYTES
        writer = _Writer(temporary, single_file_per_rank=single, thread_count=1, sync_files=False)
        plan: dict = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in lazy.items()}
        plan[COMMON_STATE] = _serialized([{}])
        try:
            with _without_process_group(), _without_checksums():
                dcp.save(plan, storage_writer=writer, planner=_LazyPlanner(lazy), no_dist=True)
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]  # what went wrong, without the writer's wrapping
            if interrupted(cause):  # asked before raising it here, which forgets what it came from
                raise KeyboardInterrupt from None
            raise cause from None
        if model_config is not None:
            write_json(temporary / "model_config.json", model_config)
        if add_files is not None:
            add_files(temporary)
        write_json(temporary / COMPLETE_MARK, {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        write_checksums(temporary, hash_files(temporary, files_in(temporary)))


@contextmanager
def _without_process_group() -> Iterator[None]:
    """Torch warns that it saves and loads in a single process; that is what is asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save computes a CRC of every tensor, which torch.load never looks at; it is a sixth of the time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _serialized(value: list) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer
