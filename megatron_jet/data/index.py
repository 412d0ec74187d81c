"""index.json of a prepared data directory: which shards there are, what is in them, and how sources are read.

A directory may come from anywhere, so every name, path and number in the file is checked when it is read.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import SCHEMA_VERSION, read_json_object
from megatron_jet.tasks import vocabulary as vocab

SPLITS = ("train", "search", "heldout")
LARGEST_VOCAB = 1 << 32  # token ids have 32 bits at most
LONGEST_SEQUENCE = 1 << 24  # tokens; an evaluation allocates hundreds of them

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*$", max_length=200)]  # of a source or split
ShardPath = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]*/[a-z][a-z0-9_-]*-[0-9]{6,9}\.tar$")]
Checksum = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[int, Field(ge=0, lt=LARGEST_VOCAB)]
Count = Annotated[int, Field(ge=0)]


class SourceInfo(StrictModel):
    """How the samples of one source become sequences, and how they are scored."""

    packing: Literal["stream", "whole"] = Field(
        description="stream: documents are joined and cut into windows; whole: a sample is never cut"
    )
    metric: Literal["loss", "exact", "choice"] = Field(description="what accuracy means: none, argmax, best choice")
    choices: list[Token] | None = Field(default=None, description="token ids to choose from, for metric 'choice'")

    @model_validator(mode="after")
    def _choices_to_choose_from(self) -> "SourceInfo":
        if self.metric == "choice" and not self.choices:
            raise ValueError("metric 'choice' needs choices")
        return self


# Of `data.path=bundled`: the standard library and the synthetic tasks.
BUNDLED_SOURCES = {
    "text": SourceInfo(packing="stream", metric="loss"),
    "recall": SourceInfo(packing="whole", metric="exact"),
    "choice": SourceInfo(
        packing="whole", metric="choice", choices=list(range(vocab.LETTERS, vocab.LETTERS + vocab.NUM_LETTERS))
    ),
    "copy": SourceInfo(packing="whole", metric="exact"),
}


class ShardInfo(StrictModel):
    """One tar file with samples of one source."""

    path: ShardPath = Field(description="relative to the data directory: SPLIT/SOURCE-NUMBER.tar")
    source: Name
    samples: int = Field(ge=1)
    tokens: int = Field(ge=1)
    sha256: Checksum


class SplitInfo(StrictModel):
    """One split. `sources` gives tokens by source."""

    sources: dict[Name, Count]
    shards: list[ShardInfo]
    longest: dict[Name, Count] = Field(
        default_factory=dict, description="tokens of the longest sample, of sources whose samples are never cut"
    )


class DataIndex(StrictModel):
    """The whole file.

    `seq_length` is the length (tokens) of evaluation sequences. No sample with an answer is longer, but for the one
    token that only serves as a label.
    """

    schema_version: int = SCHEMA_VERSION
    vocab_size: int = Field(ge=1, le=LARGEST_VOCAB)
    end_of_text: Token
    begin_of_text: list[Token] = Field(
        default_factory=list, description="tokens that the tokenizer's post-processor puts before every document"
    )
    seq_length: int = Field(ge=1, le=LONGEST_SEQUENCE)
    tokenizer_hash: str
    split_by: Literal["path", "content"] = Field(
        default="path", description="what a document's split is a hash of; data of earlier versions went by path"
    )
    inputs: dict[str, Checksum] = Field(default_factory=dict, description="sha256 by input file")
    sources: dict[Name, SourceInfo]
    splits: dict[Name, SplitInfo]

    @field_validator("schema_version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"this version of the project reads {SCHEMA_VERSION}; prepare the data again with it, or update"
            )
        return version

    def problems(self) -> Iterator[str]:
        """What in the file does not fit together."""
        named = {"end_of_text": [self.end_of_text], "begin_of_text": self.begin_of_text}
        named |= {f"choices of source '{name}'": info.choices or [] for name, info in self.sources.items()}
        for what, tokens in named.items():
            if max(tokens, default=0) >= self.vocab_size:
                yield f"{what}: token {max(tokens)} is not in a vocabulary of {self.vocab_size}"
        for split, info in self.splits.items():
            for source in (*info.sources, *info.longest):
                if source not in self.sources:
                    yield f"split '{split}' has tokens of source '{source}', which is not among the sources"
            seen = set()
            for shard in info.shards:
                if shard.source not in info.sources:
                    yield f"shard '{shard.path}' is of source '{shard.source}', of which split '{split}' has no tokens"
                if not shard.path.startswith(f"{split}/{shard.source}-") or shard.path in seen:
                    yield f"shard '{shard.path}' is no file of its own of split '{split}' and source '{shard.source}'"
                seen.add(shard.path)

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
    if not os.path.isfile(path):  # which an unreadable folder does not end with an error
        raise UserError(f"{directory}: no index.json there; make it with tools/prepare_data.py")
    index = DataIndex.parse(read_json_object(path), str(path))
    for problem in index.problems():
        raise UserError(f"{path}: {problem}; prepare the data again")
    return index


def split_info(index: DataIndex, split: str, where: str | Path) -> SplitInfo:
    """One split of an index. Raises UserError that lists the splits there are."""
    if split not in index.splits:
        raise UserError(f"{where}: no split '{split}'; it has {', '.join(index.splits)}")
    return index.splits[split]
