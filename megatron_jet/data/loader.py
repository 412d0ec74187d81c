"""Batches for training. Which sequences make up a step depends on the seed alone, not on how many ranks share it."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import DataConfig
from megatron_jet.data.index import read_index, split_info
from megatron_jet.data.packing import Position, WindowStream

BLOCK = 4096  # sources are drawn this many sequences at a time


class DataLoader:
    """Endless micro-batches of one split.

    All ranks walk the same sequence of windows and each takes its own: micro-batch m of data-parallel rank r holds the
    rows (m * dp_size + r) * micro_batch_size and following. So data-parallel ranks see disjoint samples, and one
    process sees what two would.

    Args:
        data: prepared directory and blend.
        split: name of the split.
        seq_length: tokens per sequence.
        micro_batch_size: sequences per batch on one rank.
        dp_rank, dp_size: place among the data-parallel ranks.
        seed: of the blend and the order.

    Raises:
        UserError: no such directory, split or source, or a damaged shard (when it is opened).
    """

    def __init__(
        self,
        data: DataConfig,
        split: str,
        *,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
    ):
        directory = Path(data.path)
        index = read_index(directory)
        weights = blend_weights(data.blend, split_info(index, split, directory).sources, directory)
        self.sources = list(weights)
        self.weights = np.array([weights[source] for source in self.sources])
        self.streams = [WindowStream(directory, index, split, source, seq_length + 1, seed) for source in self.sources]
        self.micro_batch_size, self.dp_rank, self.dp_size, self.seed = micro_batch_size, dp_rank, dp_size, seed
        self.row = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> dict[str, torch.Tensor]:
        """tokens, labels [b, s] int64, loss_mask [b, s] fp32, source [b] int64 (index into `sources`)."""
        rows = []
        for place in range(self.micro_batch_size * self.dp_size):
            source = self._source_of(self.row)
            self.row += 1
            window = self.streams[source].next(wanted=place // self.micro_batch_size == self.dp_rank)
            if window is not None:
                rows.append((source, *window))
        tokens = torch.from_numpy(np.stack([row[1] for row in rows]))  # [b, s + 1]
        mask = torch.from_numpy(np.stack([row[2] for row in rows]))
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": mask[:, 1:].float(),
            "source": torch.tensor([row[0] for row in rows]),
        }

    def state_dict(self) -> dict[str, Any]:
        """Position after the batches handed out so far; the same on every rank."""
        positions = {source: asdict(stream.position) for source, stream in zip(self.sources, self.streams, strict=True)}
        return {"row": self.row, "positions": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position. Raises UserError when it belongs to other sources."""
        if set(state["positions"]) != set(self.sources):
            raise UserError(
                f"the saved data position is for sources {', '.join(state['positions'])}, "
                f"the data has {', '.join(self.sources)}"
            )
        self.row = state["row"]
        for source, stream in zip(self.sources, self.streams, strict=True):
            stream.position = Position(**state["positions"][source])

    def _source_of(self, row: int) -> int:
        block, place = divmod(row, BLOCK)
        if getattr(self, "_block", None) != block:
            generator = np.random.default_rng([self.seed, 1 << 20, block])
            self._draws = generator.choice(len(self.sources), BLOCK, p=self.weights)
            self._block = block
        return int(self._draws[place])


def blend_weights(blend: dict[str, float] | None, tokens: dict[str, int], where: Path) -> dict[str, float]:
    """Probability of each source, sorted by name; without a blend in proportion to tokens.

    Raises:
        UserError: a blend that names unknown sources, is negative, or is zero throughout.
    """
    chosen = dict(tokens) if blend is None else blend
    unknown = sorted(set(chosen) - set(tokens))
    if unknown:
        raise UserError(f"data.blend: no source '{unknown[0]}' in {where}; it has {', '.join(sorted(tokens))}")
    total = sum(chosen.values())
    if total <= 0 or min(chosen.values()) < 0:
        raise UserError("data.blend: weights must not be negative, and at least one must be above 0")
    return {source: weight / total for source, weight in sorted(chosen.items()) if weight > 0}
