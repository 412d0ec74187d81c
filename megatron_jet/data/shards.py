"""webdataset shards: tar files of tokenised samples, written reproducibly and checked before they are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file
from megatron_jet.data.index import ShardInfo

SHARD_TOKENS = 1 << 24  # 32 or 64 MiB of tokens per shard
TAR_RECORD, TAR_END = 10240, 1024  # a tar file is a multiple of the one long and ends with as many zeros as the other


@dataclass(frozen=True)
class Sample:
    """One document or task sample.

    Attributes:
        tokens: [t] uint16 or uint32.
        mask: [t] uint8, one where the token counts as a target; None: everywhere.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None


def shard_path(split: str, source: str, number: int) -> str:
    """Of a shard in a data directory."""
    return f"{split}/{source}-{number:06d}.tar"


class ShardWriter:
    """Writes the samples of one source and split; the same samples give the same bytes.

    Args:
        directory: the data directory.
        split: name of the split, also the sub-directory.
        source: name of the source, also the start of the file names.
        vocab_size: decides between 16 and 32 bits per token.
    """

    def __init__(self, directory: Path, split: str, source: str, vocab_size: int):
        self.directory, self.split, self.source = directory, split, source
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.shards: list[ShardInfo] = []
        self._writer: wds.TarWriter | None = None
        (directory / split).mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample, name: str) -> None:
        """Append a sample; `name` says where it came from."""
        if self._writer is None:
            self._path = shard_path(self.split, self.source, len(self.shards))
            # Fixed times and owners keep the file reproducible.
            self._writer = wds.TarWriter(str(self.directory / self._path), mtime=0, user="root", group="root")
            self._samples = self._tokens = 0
        row = {
            "__key__": f"{self._samples:09d}",
            "tokens.npy": sample.tokens.astype(self.dtype),
            "json": {"source": self.source, "id": name},
        }
        if sample.mask is not None:
            row["mask.npy"] = sample.mask.astype(np.uint8)
        self._writer.write(row)
        self._samples += 1
        self._tokens += len(sample.tokens)
        if self._tokens >= SHARD_TOKENS:
            self.close()

    def close(self) -> None:
        """Finish the open shard and note its checksum."""
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self.shards.append(
            ShardInfo(
                path=self._path,
                source=self.source,
                samples=self._samples,
                tokens=self._tokens,
                sha256=hash_file(self.directory / self._path),
            )
        )


def check_shard(directory: Path, shard: ShardInfo) -> None:
    """Raise UserError that names the shard when it is missing or its bytes are not those in the index."""
    path = directory / shard.path
    if not path.is_file():
        raise UserError(f"shard {path} is missing; prepare the data again")
    if hash_file(path) != shard.sha256:
        raise UserError(f"shard {path} is damaged: its checksum is not the one in index.json; prepare the data again")


def check_shard_ends(directory: Path, shard: ShardInfo) -> None:
    """Raise UserError that names the shard when it is missing or was cut short. Reads its last bytes only."""
    path = directory / shard.path
    if not path.is_file():
        raise UserError(f"shard {path} is missing; prepare {directory} again")
    size = path.stat().st_size
    with open(path, "rb") as f:
        f.seek(max(0, size - TAR_END))
        ends = f.read() == bytes(TAR_END)
    if not ends or size % TAR_RECORD:
        raise UserError(f"shard {path} is cut short; prepare {directory} again")


def read_shard(directory: Path, shard: ShardInfo) -> list[Sample]:
    """All samples of a shard, in order. Raises UserError that names the shard when it cannot be read."""
    try:
        samples = list(_samples(directory / shard.path))
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise UserError(f"shard {directory / shard.path} cannot be read ({error}); prepare the data again") from None
    if len(samples) != shard.samples:
        raise UserError(
            f"shard {directory / shard.path} has {len(samples)} samples, index.json says {shard.samples}; "
            "prepare the data again"
        )
    return samples


def _samples(path: Path) -> Iterator[Sample]:
    # Every rank reads the whole shard, since the loader itself deals sequences out to ranks.
    dataset = wds.WebDataset([str(path)], shardshuffle=False, empty_check=False, nodesplitter=None).decode()
    for row in dataset:
        yield Sample(row["tokens.npy"], row.get("mask.npy"))
