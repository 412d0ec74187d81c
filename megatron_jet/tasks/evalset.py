"""What accuracy means: fixed sequences with scored positions, and a scorer that sees logits piece by piece."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import LOGIT_CHUNK_TOKENS
from megatron_jet.data.index import read_index, split_info
from megatron_jet.data.packing import WindowStream

IGNORED = -100
SUMS = ("loss", "correct", "scored", "rows", "scored_squared", "correct_squared", "correct_times_scored")
TOO_LONG = "prepare the data again: tools/prepare_data.py leaves out what is longer than its --seq-length"


@dataclass(frozen=True)
class EvalSet:
    """Sequences of one source of one split.

    Attributes:
        name: of the source.
        metric: "loss" (no accuracy), "exact" (argmax over the vocabulary) or "choice" (argmax over `choices`).
        tokens: inputs [n, s] int64.
        labels: next tokens [n, s] int64, -100 where not scored.
        choices: token ids to choose from.
    """

    name: str
    metric: str
    tokens: Tensor
    labels: Tensor
    choices: list[int] | None = None

    def first(self, count: int) -> "EvalSet":
        """The first `count` sequences."""
        return replace(self, tokens=self.tokens[:count], labels=self.labels[:count])


def load_eval_sets(
    data_dir: str | Path, split: str, samples: int = 512, vocab_size: int | None = None
) -> list[EvalSet]:
    """One eval set per source of a split, in file order, sorted by name.

    Args:
        data_dir: prepared directory.
        split: name of the split.
        samples: most sequences of one source; the split may have fewer.
        vocab_size: of the model that is to read them, where nobody has compared it yet.

    Raises:
        UserError: no index, no such split, a damaged shard, a vocabulary that the model does not have, or a sample
            longer than an evaluation sequence.
    """
    directory = Path(data_dir)
    index = read_index(directory)
    if vocab_size is not None and index.vocab_size > vocab_size:
        raise UserError(
            f"{directory}: prepared for a vocabulary of {index.vocab_size}, the model's has {vocab_size}; prepare the "
            "data with the model's tokenizer"
        )
    sets = []
    for source in sorted(split_info(index, split, directory).sources):
        stream = WindowStream(directory, index, split, source, index.seq_length + 1, seed=None, advice=TOO_LONG)
        rows = []
        while len(rows) < samples:
            window = stream.next()
            if stream.position.epoch and rows:
                break  # the last window may have run into the second pass
            rows.append(window)
        tokens, mask = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
        info = index.sources[source]
        labels = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
        sets.append(EvalSet(source, info.metric, tokens[:, :-1].contiguous(), labels, info.choices))
    return sets


class Scorer:
    """Accumulates the scores of one eval set over pieces of it, so that no more logits than one piece exist at once."""

    def __init__(self, evalset: EvalSet):
        self.evalset = evalset
        self._sums = dict.fromkeys(SUMS, 0.0)

    def update(self, rows: slice, logits: Tensor) -> None:
        """Add sequences.

        Args:
            rows: which sequences of the eval set.
            logits: [rows, s, vocab].
        """
        self.update_scored(rows, logits, lambda picked: picked.float())

    def update_scored(self, rows: slice, values: Tensor, logits_of: Callable[[Tensor], Tensor]) -> None:
        """Add sequences; logits exist at scored positions only, and of at most LOGIT_CHUNK_TOKENS of them at a time.

        Args:
            rows: which sequences of the eval set.
            values: what logits are made of [rows, s, ...], such as hidden states.
            logits_of: [n, ...] values -> [n, vocab] fp32.
        """
        labels = self.evalset.labels[rows].to(values.device)
        scored = labels != IGNORED
        answers = labels[scored]  # [answers]
        losses = [torch.zeros(0, device=values.device)]
        right = [torch.zeros(0, dtype=torch.bool, device=values.device)]
        for picked, part in zip(values[scored].split(LOGIT_CHUNK_TOKENS), answers.split(LOGIT_CHUNK_TOKENS)):
            if not len(part):
                continue
            logits = logits_of(picked)
            losses.append(F.cross_entropy(logits, part, reduction="none"))
            right.append(self._predictions(logits) == part)
        # Sums over many tokens are taken in fp64, so that their order does not show.
        self._sums["loss"] += torch.cat(losses).double().sum().item()
        hits = torch.zeros_like(labels, dtype=torch.float64)
        hits[scored] = torch.cat(right).double()
        correct, total = hits.sum(-1), scored.double().sum(-1)  # [rows], [rows]
        for name, per_row in {
            "scored": total,
            "correct": correct,
            "rows": (total > 0).double(),
            "scored_squared": total * total,
            "correct_squared": correct * correct,
            "correct_times_scored": correct * total,
        }.items():
            self._sums[name] += per_row.sum().item()

    def _predictions(self, logits: Tensor) -> Tensor:
        if self.evalset.metric != "choice":
            return logits.argmax(-1)
        choices = torch.tensor(self.evalset.choices, device=logits.device)
        return choices[logits[:, choices].argmax(-1)]

    def sums(self) -> dict[str, float]:
        """Partial sums, to be merged elsewhere."""
        return dict(self._sums)

    def merge(self, sums: dict[str, float]) -> None:
        """Add another scorer's sums."""
        for key, value in sums.items():
            self._sums[key] += value

    def result(self) -> dict[str, float]:
        """Mean loss (nats per scored token); unless the metric is loss also accuracy, its standard error, and how many
        sequences hold answers."""
        count = max(self._sums["scored"], 1.0)
        result = {"loss": self._sums["loss"] / count}
        if self.evalset.metric != "loss":
            result["accuracy"] = self._sums["correct"] / count
            result["error"] = self._standard_error(result["accuracy"])
            result["sequences"] = int(self._sums["rows"])
        return result

    def _standard_error(self, accuracy: float) -> float:
        """Of a ratio of sums over sequences: answers within one sequence are not independent (cluster sampling)."""
        sums, rows = self._sums, self._sums["rows"]
        if rows < 2:
            return 0.0
        residuals = sums["correct_squared"] - 2 * accuracy * sums["correct_times_scored"]
        residuals += accuracy**2 * sums["scored_squared"]
        return math.sqrt(max(0.0, residuals) * rows / (rows - 1)) / sums["scored"]
