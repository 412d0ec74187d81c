"""The shards of one source in the order of each epoch, the next one read while this one is used."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_jet.data.index import ShardInfo
from megatron_jet.data.shard_format import Sample
from megatron_jet.data.shards import check_shard, check_tokens, read_shard


class ShardReader:
    """Reads shards in an order drawn from (seed, epoch), and samples within a shard likewise.

    What comes out does not depend on what was read ahead, only how long it takes.

    Args:
        directory: prepared data directory.
        shards: of the source.
        seed: of the order; None keeps that of the files.
        vocab_size: no token id may reach it; None does not look.
    """

    def __init__(self, directory: Path, shards: list[ShardInfo], seed: int | None, vocab_size: int | None = None):
        self.directory, self.shards, self.seed, self.vocab_size = directory, shards, seed, vocab_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")  # started by the first thing to do
        self._ahead: tuple[int, Future] | None = None  # number of a shard that is being read
        self._here: tuple[int, list[Sample]] | None = None  # the last one
        self._epoch_order: tuple[int, np.ndarray] | None = None
        self._checked: set[str] = set()

    def samples(self, epoch: int, place: int) -> list[Sample]:
        """All samples of the shard in some place of an epoch's order.

        Raises:
            UserError: names a shard that is missing or damaged.
        """
        number = self._number(epoch, place)
        if self._here is None or self._here[0] != number:
            ahead, self._ahead = self._ahead, None
            read = ahead is not None and ahead[0] == number
            self._here = (number, ahead[1].result() if read else self._read(number))
        samples = self._here[1]
        return [samples[i] for i in self._order(epoch, number, len(samples))]

    def read_ahead(self, epoch: int, place: int) -> None:
        """Start reading the shard after this one, unless that has been done."""
        following = (epoch, place + 1) if place + 1 < len(self.shards) else (epoch + 1, 0)
        number = self._number(*following)
        if self._here is not None and self._here[0] == number:
            return
        if self._ahead is None or self._ahead[0] != number:
            self._ahead = (number, self._thread.submit(self._read, number))

    def _number(self, epoch: int, place: int) -> int:
        """Which shard comes at a place of an epoch."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self._order(epoch, -1, len(self.shards)))
        return int(self._epoch_order[1][place])

    def _read(self, number: int) -> list[Sample]:
        shard = self.shards[number]
        if shard.path not in self._checked:
            check_shard(self.directory, shard)
            self._checked.add(shard.path)
        samples = read_shard(self.directory, shard)
        if self.vocab_size is not None:
            for sample in samples:
                check_tokens(sample.tokens, self.vocab_size, f"shard {self.directory / shard.path}")
        return samples

    def _order(self, epoch: int, shard: int, count: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(count)
        return np.random.default_rng([self.seed, epoch, shard + 1]).permutation(count)
