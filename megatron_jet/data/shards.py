"""webdataset shards: tar files of tokenised samples, written reproducibly and checked when they are read."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset as wds

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file
from megatron_jet.data.index import ShardInfo
from megatron_jet.data.shard_format import FormatError, Sample, read_samples

SHARD_TOKENS = 1 << 24  # 32 or 64 MiB of tokens per shard
READ_BYTES = 1 << 20  # at a time
TAR_RECORD, TAR_END = 10240, 1024  # a tar file is a multiple of the one long and ends with as many zeros as the other


def shard_path(split: str, source: str, number: int) -> str:
    """Of a shard in a data directory."""
    return f"{split}/{source}-{number:06d}.tar"


class ShardWriter:
    """Writes the samples of one source and split; the same samples give the same bytes.

    Args:
        directory: the data directory.
        split: name of the split, also the sub-directory.
        source: name of the source, also the start of the file names.
        vocab_size: decides between 16 and 32 bits per token; no token id reaches it.
    """

    def __init__(self, directory: Path, split: str, source: str, vocab_size: int):
        self.directory, self.split, self.source, self.vocab_size = directory, split, source, vocab_size
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.shards: list[ShardInfo] = []
        self._file: BinaryIO | None = None
        (directory / split).mkdir(parents=True, exist_ok=True)

    def add(self, sample: Sample, name: str) -> None:
        """Append a sample; `name` says where it came from. Raises UserError for a token id beyond the vocabulary."""
        check_tokens(sample.tokens, self.vocab_size, name)
        if self._file is None:
            self._path = shard_path(self.split, self.source, len(self.shards))
            self._file = open(self.directory / self._path, "wb")  # noqa: SIM115  `close` closes it
            # Fixed times and owners keep the file reproducible.
            self._writer = wds.TarWriter(self._file, mtime=0, user="root", group="root")
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

    def abandon(self) -> None:
        """Let go of the open shard, of which nothing will be kept. Else the tar stream would complain when it is
        collected, with a traceback below the line that says what went wrong."""
        if self._file is None:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._file.fileno())  # what is buffered goes there, also where the disk is full
        os.close(nowhere)
        self._writer.close()
        self._file.close()
        self._file = None

    def close(self) -> None:
        """Finish the open shard and note its checksum."""
        if self._file is None:
            return
        self._writer.close()
        self._file.close()
        self._file = None
        self.shards.append(
            ShardInfo(
                path=self._path,
                source=self.source,
                samples=self._samples,
                tokens=self._tokens,
                sha256=hash_file(self.directory / self._path),
            )
        )


def check_tokens(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    """Raise UserError for a token id that a vocabulary does not have. It would be another token, or none, later on."""
    if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
        wrong = int(tokens.max()) if tokens.max() >= vocab_size else int(tokens.min())
        raise UserError(
            f"{where}: token {wrong} is not in a vocabulary of {vocab_size}; prepare the data with the tokenizer and "
            "the config.json of one model"
        )


def shard_file(directory: Path, shard: ShardInfo) -> Path:
    """Where a shard is. Raises UserError that names it when it is missing, or a link that leads elsewhere."""
    path = directory / shard.path
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise UserError(f"shard {path} is a link that leads out of {directory}; put the file itself there")
    if not os.path.isfile(path):
        raise UserError(f"shard {path} is missing; prepare {directory} again")
    return path


def check_shard(directory: Path, shard: ShardInfo) -> None:
    """Raise UserError that names the shard when it is missing or its bytes are not those in the index."""
    path = shard_file(directory, shard)
    try:
        same = hash_file(path) == shard.sha256
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error.strerror or error})") from None
    if not same:
        raise UserError(f"shard {path} is damaged: its checksum is not the one in index.json; prepare the data again")


def check_shard_ends(directory: Path, shard: ShardInfo) -> None:
    """Raise UserError that names the shard when it is missing or was cut short. Reads its last bytes only."""
    path = shard_file(directory, shard)
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            f.seek(max(0, size - TAR_END))
            ends = f.read() == bytes(TAR_END)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error.strerror or error})") from None
    if not ends or size % TAR_RECORD:
        raise UserError(f"shard {path} is cut short; prepare {directory} again")


def read_shard(directory: Path, shard: ShardInfo) -> list[Sample]:
    """All samples of a shard, in order.

    Raises:
        UserError: names a shard that cannot be read, or holds something else than what the index says.
    """
    path = shard_file(directory, shard)
    try:
        with open(path, "rb", buffering=READ_BYTES) as file:
            samples = list(read_samples(file))
    except (FormatError, OSError) as error:
        raise UserError(f"shard {path} cannot be read ({error}); prepare the data again") from None
    tokens = sum(len(sample.tokens) for sample in samples)
    if (len(samples), tokens) != (shard.samples, shard.tokens):
        raise UserError(
            f"shard {path} has {len(samples)} samples of {tokens} tokens, index.json says {shard.samples} of "
            f"{shard.tokens}; prepare the data again"
        )
    return samples
