"""What the teacher sees when: sources, numbers of pairs, and hints that are withdrawn.

Recall needs two steps, linking a value with the key before it and matching the key asked for, and the gradient that
teaches both at once is tiny. So each is first taught alone: alternating tokens grow a head that looks one token back,
hinted values grow one that matches. The hints go as soon as the first head is there. Everything else follows by
itself: more keys, more pairs, multiple choice, copying and text.
"""

from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_jet.tasks import synthetic
from megatron_jet.tasks import vocabulary as vocab

LENGTH = 256  # of text, and of all samples once the curriculum is through
SYMBOLS = np.arange(vocab.KEYS, vocab.VOCAB_SIZE)
CHARACTERS = np.arange(32, 127)
FIRST_KEYS, FIRST_PAIRS, LAST_PAIRS = 16, 8, 48
PAIRS_STEP = 4
RECALL_ANSWERS = 768  # pairs and queries of a recall batch while pairs still grow


class Batch(NamedTuple):
    """Sequences of one source.

    Attributes:
        source: its name.
        weight: of its mean loss.
        tokens: int64 `[b, s]`.
        learned: bool `[b, s]`, tokens that count in the loss as targets.
        scored: bool `[b, s]`, tokens that count in the accuracy.
    """

    source: str
    weight: float
    tokens: np.ndarray
    learned: np.ndarray
    scored: np.ndarray


@dataclass
class Curriculum:
    """Position in the curriculum, driven by the accuracies seen in training.

    Attributes:
        linking: the first phase, recall and alternating tokens only.
        hint: share of hinted recall values.
        keys: recall keys in use.
        pairs: greatest number of pairs of a recall batch.
        accuracy: running mean by source.
    """

    linking: bool = True
    hint: float = 1.0
    keys: int = FIRST_KEYS
    pairs: int = FIRST_PAIRS
    accuracy: dict[str, float] = field(default_factory=dict)

    @property
    def through(self) -> bool:
        """Whether nothing is left to open: long samples, copying and mostly text from here on."""
        return self.pairs == LAST_PAIRS and min(self.accuracy.get(s, 0.0) for s in ("recall", "choice")) > 0.9

    def batches(self, rng: np.random.Generator, text: np.ndarray) -> list[Batch]:
        """Draws one step's batches.

        Args:
            rng: source of randomness; its state decides the batches.
            text: tokens of the training documents, `[m]`.
        """
        if self.linking:
            alternating = synthetic.alternating(rng, 16, 48, SYMBOLS)
            return [self._recall(rng), _task("alternating", 0.5, alternating)]
        through = self.through
        questions = LENGTH // synthetic.CHOICE_LENGTH if through else 10
        choice = synthetic.choice(rng, 2 if through else 8, questions)
        tokens, again = synthetic.copy(rng, text, 4, LENGTH)
        everything = np.ones(tokens.shape, bool)
        prose = synthetic.windows(rng, text, 8 if through else 4, LENGTH)
        batches = [
            self._recall(rng),
            _task("choice", 1.0, choice),
            Batch("copy", 0.5, tokens, everything, again.astype(bool)),
            _task("text", 1.0, (prose, np.ones(prose.shape))),
        ]
        if through:
            # The symbols carry what recall has learned over to copying, the characters from there to text.
            parts = [synthetic.repeated(rng, 3, LENGTH // 2, alphabet) for alphabet in (SYMBOLS, CHARACTERS)]
            tokens, mask = (np.concatenate(part) for part in zip(*parts, strict=True))
            batches.append(_task("repeated", 1.0, (tokens, mask)))
        return batches

    def _recall(self, rng: np.random.Generator) -> Batch:
        if self.through:
            pairs, rows = int(rng.integers(FIRST_PAIRS, self.pairs + 1)), 3
            queries = (LENGTH - 2 - 2 * pairs) // 2
        else:
            pairs = self.pairs
            queries = min(32, 2 * pairs)
            rows = max(8, RECALL_ANSWERS // (pairs + queries))
        return _task("recall", 1.0, synthetic.recall(rng, rows, pairs, queries, self.keys, self.hint))

    def update(self, accuracy: dict[str, float]) -> None:
        """Notes the accuracies of a step by source, lowers the hint, and opens what comes next."""
        for name, value in accuracy.items():
            self.accuracy[name] = 0.95 * self.accuracy.get(name, value) + 0.05 * value
        recall, alternating = self.accuracy["recall"], self.accuracy["alternating"]
        # Below one half the hint would be missed before the other head is there, and matching would be unlearned.
        may_lower = self.hint > 0.55 or alternating > 0.9
        if self.hint > 0 and may_lower and recall > min(0.97, 0.85 * self.hint + 0.1):
            self.hint = max(0.0, round(self.hint - 0.1, 2))
            self.accuracy["recall"] -= 0.02
        if alternating > 0.99:
            self.linking = False
        if self.hint == 0 and recall > 0.95 and (self.keys < vocab.NUM_KEYS or self.pairs < LAST_PAIRS):
            if self.keys < vocab.NUM_KEYS:
                self.keys *= 2
            else:
                self.pairs += PAIRS_STEP
            self.accuracy["recall"] -= 0.1

    def state(self) -> dict:
        """Returns everything needed to go on, JSON-able."""
        return asdict(self)


def _task(source: str, weight: float, sample: tuple[np.ndarray, np.ndarray]) -> Batch:
    tokens, mask = sample
    return Batch(source, weight, tokens, mask.astype(bool), mask.astype(bool))
