"""index.json of a prepared data directory: which shards there are, what is in them, and how sources are read."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import SCHEMA_VERSION, read_json

SPLITS = ("train", "search", "heldout")


class SourceInfo(StrictModel):
    """How the samples of one source become sequences, and how they are scored."""

    packing: Literal["stream", "whole"] = Field(
        description="stream: documents are joined and cut into windows; whole: a sample is never cut"
    )
    metric: Literal["loss", "exact", "choice"] = Field(description="what accuracy means: none, argmax, best choice")
    choices: list[int] | None = Field(default=None, description="token ids to choose from, for metric 'choice'")


class ShardInfo(StrictModel):
    """One tar file with samples of one source."""

    path: str = Field(description="relative to the data directory")
    source: str
    samples: int
    tokens: int
    sha256: str


class SplitInfo(StrictModel):
    """One split. `sources` gives tokens by source."""

    sources: dict[str, int]
    shards: list[ShardInfo]
    longest: dict[str, int] = Field(
        default_factory=dict, description="tokens of the longest sample, of sources whose samples are never cut"
    )


class DataIndex(StrictModel):
    """The whole file.

    `seq_length` is the length (tokens) of evaluation sequences. No sample with an answer is longer, but for the one
    token that only serves as a label.
    """

    schema_version: int = SCHEMA_VERSION
    vocab_size: int
    end_of_text: int
    seq_length: int
    tokenizer_hash: str
    inputs: dict[str, str] = Field(default_factory=dict, description="sha256 by input file")
    sources: dict[str, SourceInfo]
    splits: dict[str, SplitInfo]

    def summary(self) -> str:
        """A line per split: shards, and tokens by source."""
        lines = []
        for name, split in self.splits.items():
            counts = ", ".join(f"{source} {tokens:,}" for source, tokens in split.sources.items())
            lines.append(f"{name}: {len(split.shards)} shards, tokens: {counts}")
        return "\n".join(lines)


def read_index(directory: str | Path) -> DataIndex:
    """Read a prepared directory's index. Raises UserError when there is none or it is damaged."""
    path = Path(directory) / "index.json"
    if not path.is_file():
        raise UserError(f"{directory}: no index.json there; make it with tools/prepare_data.py")
    return DataIndex.parse(read_json(path), str(path))


def split_info(index: DataIndex, split: str, where: str | Path) -> SplitInfo:
    """One split of an index. Raises UserError that lists the splits there are."""
    if split not in index.splits:
        raise UserError(f"{where}: no split '{split}'; it has {', '.join(index.splits)}")
    return index.splits[split]
