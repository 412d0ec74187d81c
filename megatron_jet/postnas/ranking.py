"""How candidates are ranked. The rules are stated in words in every result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_jet.configs.results import CandidateResult, Scores
from megatron_jet.configs.stages import ThroughputConfig

DIGITS = 4  # accuracies closer than this are equal; the smallest step of a few hundred answers is larger


@dataclass(frozen=True)
class Ranking:
    """Candidates best first, the winner, and why."""

    order: list[str]
    winner: str
    rule: str
    pareto: list[str]


def mean_accuracy(scores: Scores) -> float:
    """Mean over all tasks that have an accuracy."""
    return sum(scores.accuracy.values()) / len(scores.accuracy)


def throughput_of(candidate: CandidateResult, settings: ThroughputConfig) -> float:
    """Generated tokens per second at the longest context, measured or from the cost formulas as the mode says.

    0 for a candidate of which not even one sequence fitted into memory: it has no figure, and is the slowest.
    """
    by_context = candidate.analytic_tokens_per_second
    if settings.mode == "measured":
        by_context = candidate.measured.generation_tokens_per_second
    return by_context.get(str(max(settings.contexts)), 0.0)


def rank_by_accuracy(candidates: Sequence[CandidateResult], settings: ThroughputConfig) -> Ranking:
    """Blocks: the most accurate first; throughput decides between equals."""
    speed = {c.name: throughput_of(c, settings) for c in candidates}
    order = sorted(candidates, key=lambda c: (-_accuracy(c), -speed[c.name], c.name))
    return Ranking(
        order=[c.name for c in order],
        winner=_first_eligible(order),
        rule=(
            f"highest mean accuracy over {_tasks(candidates)} on the search split; equal to {DIGITS} digits: higher "
            f"{settings.mode} generation throughput{_ablation_note(candidates)}"
        ),
        pareto=pareto_front(candidates, speed),
    )


def rank_within_throughput(candidates: Sequence[CandidateResult], settings: ThroughputConfig) -> Ranking:
    """Hardware-aware search: of those about as fast as the fastest, the most accurate (paper, section 2.5)."""
    speed = {c.name: throughput_of(c, settings) for c in candidates}
    floor = (1 - settings.tie) * max(speed.values())
    order = sorted(candidates, key=lambda c: (speed[c.name] < floor, -_accuracy(c), -speed[c.name], c.name))
    return Ranking(
        order=[c.name for c in order],
        winner=_first_eligible(order),
        rule=(
            f"highest mean accuracy over {_tasks(candidates)} on the search split among candidates within "
            f"{settings.tie:.0%} of the best {settings.mode} generation throughput"
        ),
        pareto=pareto_front(candidates, speed),
    )


def pareto_front(candidates: Sequence[CandidateResult], speed: Mapping[str, float]) -> list[str]:
    """Names no other candidate beats in both accuracy and throughput, fastest first."""
    front, best = [], float("-inf")
    for candidate in sorted(candidates, key=lambda c: (-speed[c.name], -_accuracy(c))):
        if _accuracy(candidate) > best:
            front.append(candidate.name)
            best = _accuracy(candidate)
    return front


def _accuracy(candidate: CandidateResult) -> float:
    return round(mean_accuracy(candidate.scores), DIGITS)


def _first_eligible(order: Sequence[CandidateResult]) -> str:
    return next(c.name for c in order if not c.ablation)


def _tasks(candidates: Sequence[CandidateResult]) -> str:
    return ", ".join(candidates[0].scores.accuracy)


def _ablation_note(candidates: Sequence[CandidateResult]) -> str:
    names = [c.name for c in candidates if c.ablation]
    return f"; {', '.join(names)} is an ablation and cannot win" if names else ""
