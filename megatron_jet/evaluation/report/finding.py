"""A finding of the paper next to what a run shows, and when a difference counts.

Two accuracies count as different when they are two standard errors apart, counting sequences: answers within one
sequence are not independent. That is strict; the models are scored on the same sequences, so smaller ones can be real.
"""

import math
from typing import Any

SHOWS, SHOWS_NOT, NOISE = "shows", "does not show", "within noise"

Report = dict[str, Any]
Finding = dict[str, str]


def finding(name: str, paper: str, here: str, verdict: str, why_not: str = "") -> Finding:
    """One row. `why_not` is the likely reason, kept only when the finding does not show."""
    return {
        "name": name,
        "paper": paper,
        "here": here,
        "verdict": verdict,
        "why_not": "" if verdict == SHOWS else why_not,
    }


def judge(difference: float, error: float) -> str:
    """`difference` in the direction of the paper's finding; `error` is its standard error."""
    if difference > 0 and difference >= 2 * error:
        return SHOWS
    return SHOWS_NOT if difference <= -2 * error else NOISE


def standard_error(first: float, second: float, samples: int) -> float:
    """Of the difference of two accuracies over `samples` sequences each; at least half the weight of one sequence."""
    spread = math.sqrt(max(0.0, first * (1 - first) + second * (1 - second)) / samples)
    return max(spread, 0.5 / samples)


def resolution(error: float) -> str:
    """A sentence about what a run of this size can tell apart."""
    return f"With this many sequences, differences below {200 * error:.1f} points cannot be told from chance."


def layers_text(layers: list[int] | tuple[int, ...]) -> str:
    """`{2, 5}`, as the paper writes placements (0-based)."""
    return "{" + ", ".join(str(layer) for layer in layers) + "}"


def percent(value: float) -> str:
    """An accuracy as the report prints it."""
    return f"{100 * value:.1f}%"


def mean_accuracy(scores: dict[str, Any]) -> float:
    """Mean over the tasks of a Scores dict, as the ranking rules use it."""
    return sum(scores["accuracy"].values()) / len(scores["accuracy"])
