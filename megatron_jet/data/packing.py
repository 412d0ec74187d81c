"""Samples -> windows of fixed length, with a position from which the very same windows follow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_jet.configs.errors import UserError
from megatron_jet.data.index import DataIndex, split_info
from megatron_jet.data.reader import ShardReader
from megatron_jet.data.shard_format import Sample


@dataclass
class Position:
    """Where a stream of windows stands: the next token to read.

    Attributes:
        epoch: full passes done.
        shard: index into the epoch's order of shards.
        sample: index into the shard's order of samples.
        offset: tokens of that sample already used.
    """

    epoch: int = 0
    shard: int = 0
    sample: int = 0
    offset: int = 0


class WindowStream:
    """Endless windows of one source of one split.

    Every epoch has its own order of shards, and of samples within a shard, drawn from (seed, epoch). Within an epoch no
    token is repeated or left out.

    Args:
        directory: prepared data directory.
        index: its index.
        split: name of the split.
        source: name of the source.
        length: tokens per window.
        seed: of the order; None reads in file order.
        advice: what to do about a sample that is longer than a window and must not be cut.
    """

    def __init__(
        self,
        directory: Path,
        index: DataIndex,
        split: str,
        source: str,
        length: int,
        seed: int | None,
        advice: str = "raise training.seq_length, or prepare the data with a --seq-length that is no longer",
    ):
        self.directory, self.length, self.seed = directory, length, seed
        self.source, self.end_of_text, self.advice = source, index.end_of_text, advice
        self.whole = index.sources[source].packing == "whole"
        self.shards = [shard for shard in split_info(index, split, directory).shards if shard.source == source]
        if not self.shards:
            raise UserError(f"{directory}: source '{source}' has no shard in split '{split}'")
        self.position = Position()
        self._reader = ShardReader(directory, self.shards, seed, index.vocab_size)
        self._loaded: tuple[tuple[int, int], list[Sample]] | None = None

    def next(self, wanted: bool = True) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens and mask of the next window, [length] each; None if not `wanted` (the position moves all the same)."""
        pieces = list(self._whole_pieces() if self.whole else self._stream_pieces())
        if not wanted:
            return None
        tokens = np.full(self.length, self.end_of_text, np.int64)
        mask = np.zeros(self.length, np.uint8)
        filled = 0
        for piece_tokens, piece_mask in pieces:
            end = filled + len(piece_tokens)
            tokens[filled:end] = piece_tokens
            mask[filled:end] = 1 if piece_mask is None else piece_mask
            filled = end
        return tokens, mask

    def _stream_pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Parts of consecutive samples that together have `length` tokens."""
        missing = self.length
        while missing:
            sample = self._current()
            start = self.position.offset
            end = min(start + missing, len(sample.tokens))
            yield sample.tokens[start:end], None if sample.mask is None else sample.mask[start:end]
            missing -= end - start
            self.position.offset = end
            if end == len(sample.tokens):
                self._advance()

    def _whole_pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """As many whole samples as fit; the rest of the window is padding that is not scored."""
        filled = 0
        while True:
            sample = self._current()
            if len(sample.tokens) > self.length:
                raise UserError(
                    f"{self.directory}: a sample of source '{self.source}' has {len(sample.tokens)} tokens, more than "
                    f"the {self.length} of a window; {self.advice}"
                )
            if filled + len(sample.tokens) > self.length:
                return
            yield sample.tokens, sample.mask
            filled += len(sample.tokens)
            self._advance()

    def _current(self) -> Sample:
        position = self.position
        key = (position.epoch, position.shard)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = (key, self._reader.samples(*key))
        samples = self._loaded[1]
        if position.sample == len(samples) // 2:  # not at once: an evaluation set may need no second shard
            self._reader.read_ahead(*key)
        return samples[position.sample]

    def _advance(self) -> None:
        """To the next sample, shard or epoch."""
        position = self.position
        position.sample, position.offset = position.sample + 1, 0
        if position.sample == len(self._loaded[1]):
            position.sample, position.shard = 0, position.shard + 1
        if position.shard == len(self.shards):
            position.shard, position.epoch = 0, position.epoch + 1
