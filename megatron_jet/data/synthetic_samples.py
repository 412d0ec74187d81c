"""The synthetic tasks as samples of a data directory, by split and seed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_jet.configs.errors import UserError
from megatron_jet.data.index import BUNDLED_SOURCES, SPLITS, SourceInfo
from megatron_jet.data.shard_format import Sample
from megatron_jet.tasks import synthetic

NUMBERS = {"recall": 1, "choice": 2, "copy": 3}


@dataclass(frozen=True)
class SyntheticTask:
    """A task's number (part of its seeds) and how it is read."""

    number: int
    info: SourceInfo


SYNTHETIC = {name: SyntheticTask(number, BUNDLED_SOURCES[name]) for name, number in NUMBERS.items()}


def synthetic_samples(task: str, split: str, count: int, length: int, texts: list[np.ndarray]) -> Iterator[Sample]:
    """`count` samples of about `length` tokens; every (task, split) has a seed of its own.

    Args:
        texts: documents of the split as bytes, for copying.

    Raises:
        UserError: copying without text, or a length too short for a task.
    """
    if length < 64:
        raise UserError(f"synthetic samples of {length} tokens are too short; 64 or more")
    rng = np.random.default_rng([20261121, SYNTHETIC[task].number, SPLITS.index(split)])
    if task == "copy":
        if count and sum(map(len, texts)) < length:
            raise UserError(f"synthetic copy needs text in split '{split}'; add --stdlib or input files")
        text = np.concatenate(texts) if texts else np.zeros(0, np.uint8)
    for _ in range(count):
        if task == "recall":
            pairs = int(rng.integers(length // 16, length * 3 // 16 + 1))  # 16 to 48 at 256 tokens
            tokens, mask = synthetic.recall(rng, 1, pairs, (length - 2 - 2 * pairs) // 2)
        elif task == "choice":
            tokens, mask = synthetic.choice(rng, 1, length // synthetic.CHOICE_LENGTH)
        else:
            tokens, mask = synthetic.copy(rng, text, 1, length)
        yield Sample(tokens[0], mask[0])
