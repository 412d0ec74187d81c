"""Beam search over sets of layers. Knows nothing of models: a scorer rates sets, higher is better."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Placement = tuple[int, ...]
Value = Any  # whatever can be compared: a number, or a tuple whose later entries decide between equals


@dataclass(frozen=True)
class Round:
    """Sets of one size: every candidate with its value, and the best of them, best first."""

    candidates: dict[Placement, Value]
    kept: list[Placement]


def extensions(kept: Sequence[Placement], layers: Sequence[int]) -> list[Placement]:
    """Every set that has one layer more than a kept one, each once, in ascending order."""
    return sorted({tuple(sorted((*chosen, layer))) for chosen in kept for layer in layers if layer not in chosen})


def best_first(values: dict[Placement, Value]) -> list[Placement]:
    """By value, highest first; among equals the earlier layers."""
    return sorted(sorted(values), key=values.__getitem__, reverse=True)  # reversing keeps equals in their order


def beam_search(
    score: Callable[[list[Placement]], Sequence[Value]], layers: Sequence[int], budget: int, width: int
) -> list[Round]:
    """Grow sets of layers one layer at a time and keep the `width` best of each size.

    The paper searches placements this way (section 2.2). With `width` at least the number of sets it is exhaustive.

    Args:
        score: values of some placements of equal size, called once per round; higher is better.
        layers: layers to choose from.
        budget: layers to choose; 0 gives no rounds.
        width: sets kept per round.

    Returns:
        One round per size. The best set is `rounds[-1].kept[0]`.
    """
    kept: list[Placement] = [()]
    rounds = []
    for _ in range(budget):
        candidates = extensions(kept, layers)
        values = dict(zip(candidates, score(candidates), strict=True))
        kept = best_first(values)[:width]
        rounds.append(Round(values, kept))
    return rounds
