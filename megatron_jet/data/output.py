"""Shards in the making, by split and source, and the index of them."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.data.index import SPLITS, ShardInfo, SourceInfo, SplitInfo
from megatron_jet.data.shard_format import Sample
from megatron_jet.data.shards import ShardWriter


@dataclass
class LeftOut:
    """Samples with answers that are longer than an evaluation sequence: how many, and their lengths in tokens."""

    count: int = 0
    shortest: int = 0
    longest: int = 0

    def add(self, length: int) -> None:
        self.shortest = min(self.shortest or length, length)
        self.longest = max(self.longest, length)
        self.count += 1


@dataclass
class Output:
    """Writes samples into shards.

    Attributes:
        directory: of the shards.
        vocab_size: of the tokenizer.
        seq_length: tokens of an evaluation sequence.
        sources: what was written, by name.
        tokens: of all samples so far.
    """

    directory: Path
    vocab_size: int
    seq_length: int
    sources: dict[str, SourceInfo] = field(default_factory=dict)
    tokens: int = 0
    _writers: dict[tuple[str, str], ShardWriter] = field(default_factory=dict)
    _longest: dict[tuple[str, str], int] = field(default_factory=dict)
    _left_out: dict[str, LeftOut] = field(default_factory=dict)

    def add(self, split: str, source: str, info: SourceInfo, sample: Sample, name: str) -> None:
        """Write a sample, unless it is one that is never cut and too long."""
        key, length = (split, source), len(sample.tokens)
        if info.packing == "whole":
            # One more than a sequence has: the last token is a label only.
            if length > self.seq_length + 1:
                self._left_out.setdefault(source, LeftOut()).add(length)
                return
            self._longest[key] = max(self._longest.get(key, 0), length)
        self.sources.setdefault(source, info)
        if key not in self._writers:
            self._writers[key] = ShardWriter(self.directory, split, source, self.vocab_size)
        self._writers[key].add(sample, name)
        self.tokens += length

    def close(self) -> list[str]:
        """Finish the shards. Returns lines about what was left out.

        Raises:
            UserError: a source lost all of its samples, or there was nothing to begin with.
        """
        for writer in self._writers.values():
            writer.close()
        lines = []
        for source, left in sorted(self._left_out.items()):
            what = f"of source '{source}' are longer than --seq-length {self.seq_length} (up to {left.longest} tokens)"
            if source not in self.sources:
                raise UserError(f"all samples {what}; give {left.shortest} or more")
            lines.append(f"left out: {left.count:,} samples {what}")
        if not self._writers:
            raise UserError("nothing to prepare: the inputs hold no text")
        return lines

    def abandon(self) -> None:
        """Let go of the files: the work has failed or was stopped."""
        for writer in self._writers.values():
            writer.abandon()

    def splits(self) -> dict[str, SplitInfo]:
        """The finished shards as the index has them."""
        shards: dict[str, list[ShardInfo]] = {}
        for (split, _), writer in sorted(self._writers.items()):
            shards.setdefault(split, []).extend(writer.shards)
        return split_infos(shards, self._longest)


def split_infos(shards: dict[str, list[ShardInfo]], longest: dict[tuple[str, str], int]) -> dict[str, SplitInfo]:
    """The index's entries.

    Args:
        shards: by split, sorted by source.
        longest: tokens of the longest sample by (split, source), of sources whose samples are never cut.
    """
    splits = {}
    for split in SPLITS:
        if split not in shards:
            continue
        tokens: dict[str, int] = {}
        for shard in shards[split]:
            tokens[shard.source] = tokens.get(shard.source, 0) + shard.tokens
        own = {source: length for (name, source), length in sorted(longest.items()) if name == split}
        splits[split] = SplitInfo(sources=tokens, shards=shards[split], longest=own)
    return splits
