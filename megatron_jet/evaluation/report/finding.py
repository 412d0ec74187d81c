"""A finding of the paper next to what a run shows, and when a difference counts.

Two accuracies count as different when they are two standard errors apart. The errors are over sequences (answers within
one sequence are not independent). Both models are scored on the same sequences, so smaller differences can be real.
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


def standard_error(first: dict[str, Any], second: dict[str, Any], tasks: list[str], samples: int) -> float:
    """Of the difference of two models' mean accuracy over `tasks`.

    Args:
        first, second: Scores dicts.
        samples: sequences per task. An error is at least half the weight of one of them: nothing wrong among 16 answers
            does not mean an error of 0.
    """
    square = sum(accuracy_error(scores, task, samples) ** 2 for scores in (first, second) for task in tasks)
    return math.sqrt(square) / len(tasks)


def accuracy_error(scores: dict[str, Any], task: str, samples: int) -> float:
    """Standard error of one accuracy; results that hold none are taken as one answer per sequence. The number of
    sequences is that of the result, where it holds one: data may have fewer than the config asks for."""
    samples = scores.get("sequences", {}).get(task, samples)
    accuracy = scores["accuracy"][task]
    error = scores["error"].get(task, math.sqrt(max(0.0, accuracy * (1 - accuracy)) / samples))
    return max(error, 0.5 / samples)


def resolution(error: float) -> str:
    """A sentence about what a run of this size can tell apart."""
    return f"With this many sequences, differences below {200 * error:.1f} points cannot be told from chance."


def layers_text(layers: list[int] | tuple[int, ...]) -> str:
    """`{2, 5}`, as the paper writes placements (0-based)."""
    return "{" + ", ".join(str(layer) for layer in layers) + "}"


def percent(value: float) -> str:
    """An accuracy as the report prints it."""
    return f"{100 * value:.1f}%"


def steps_text(steps: int | None) -> str:
    """`after 20 steps`: how long a model was trained belongs to every score of it."""
    return f"after {steps:,} step{'s' if steps != 1 else ''}" if steps is not None else "after a short training"


def timed_speed(selection: dict[str, Any], candidate: dict[str, Any]) -> float | None:
    """Generation tokens per second as timed on this device; None where it was not, or did not fit into memory."""
    return (candidate["measured"]["generation_tokens_per_second"] or {}).get(selection["context"])


def losses_alone(scores: dict[str, Any]) -> list[str]:
    """Tasks of a Scores dict that have a loss and no accuracy: plain text."""
    return [task for task in scores["loss"] if task not in scores["accuracy"]]


def mean_accuracy(scores: dict[str, Any]) -> float:
    """Mean over the tasks of a Scores dict, as the ranking rules use it."""
    return sum(scores["accuracy"].values()) / len(scores["accuracy"])
