"""The search itself, given a function that scores layer plans: heat map, full-attention beam, sliding-window beam."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_jet.configs.layer_plan import LayerPlan, hybrid_plan
from megatron_jet.configs.results import BeamRound, PlacementScore, Scores
from megatron_jet.configs.stages import PlacementConfig
from megatron_jet.postnas.beam import Placement, Round, beam_search
from megatron_jet.postnas.scoring import ScoredPlans
from megatron_jet.postnas.stage import persisted

ScorePlans = Callable[[Sequence[LayerPlan]], ScoredPlans]


@dataclass(frozen=True)
class Extremes:
    """Scores of the two ends: every layer linear, every layer full (the teacher)."""

    all_linear: Scores
    all_full: Scores


@dataclass(frozen=True)
class SearchOutcome:
    """Everything the search found, as the stage's result wants it."""

    full: Placement
    swa: Placement
    heat_map: list[PlacementScore]
    beam: list[BeamRound]
    swa_beam: list[BeamRound]
    scores: Extremes
    layer_forwards: int
    layer_forwards_naive: int


@dataclass
class PlacementSearch:
    """Runs the rounds one after the other; each round's scores are a file, so a kill costs one round at most."""

    settings: PlacementConfig
    num_layers: int
    directory: Path
    score: ScorePlans
    layer_forwards: int = field(default=0, init=False)
    layer_forwards_naive: int = field(default=0, init=False)

    def run(self) -> SearchOutcome:
        settings, layers = self.settings, range(self.num_layers)
        full_values: dict[Placement, Scores] = {}
        extremes_and_singles = [(), tuple(layers), *((layer,) for layer in layers)]
        self._score_into(full_values, "heat_map", extremes_and_singles)
        rounds = beam_search(
            lambda sets: [
                accuracy_value(scores, settings.objective)
                for scores in self._score_into(full_values, f"beam_{len(sets[0])}", sets)
            ],
            layers,
            settings.budget,
            settings.beam_width,
        )
        full = rounds[-1].kept[0] if rounds else ()
        swa_values: dict[Placement, Scores] = {}
        swa_rounds = beam_search(
            lambda sets: [
                loss_value(scores, settings.swa_objective)
                for scores in self._score_into(swa_values, f"swa_{len(sets[0])}", sets, full)
            ],
            [layer for layer in layers if layer not in full],
            settings.swa_budget,
            settings.beam_width,
        )
        return SearchOutcome(
            full=full,
            swa=swa_rounds[-1].kept[0] if swa_rounds else (),
            heat_map=[PlacementScore(full=(layer,), scores=full_values[(layer,)]) for layer in layers],
            beam=[_beam_round(round_, full_values) for round_ in rounds],
            swa_beam=[_beam_round(round_, swa_values) for round_ in swa_rounds],
            scores=Extremes(full_values[()], full_values[tuple(layers)]),
            layer_forwards=self.layer_forwards,
            layer_forwards_naive=self.layer_forwards_naive,
        )

    def _score_into(
        self, known: dict[Placement, Scores], name: str, sets: list[Placement], full: Placement | None = None
    ) -> list[Scores]:
        """Scores of placements, computed for those not known yet. With `full`, the sets are of sliding windows."""
        new = [placement for placement in sets if placement not in known]
        if new:
            plans = [self._plan(placement, full) for placement in new]
            scored = persisted(self.directory / f"{name}.json", ScoredPlans, lambda: self.score(plans))
            known |= dict(zip(new, scored.scores, strict=True))
            self.layer_forwards += scored.layer_forwards
            self.layer_forwards_naive += scored.layer_forwards_naive
        return [known[placement] for placement in sets]

    def _plan(self, placement: Placement, full: Placement | None) -> LayerPlan:
        if full is None:
            return hybrid_plan(self.num_layers, self.settings.linear, placement)
        windows = dict.fromkeys(placement, self.settings.swa_window)
        return hybrid_plan(self.num_layers, self.settings.linear, full, windows)


def accuracy_value(scores: Scores, objective: str) -> tuple[float, float]:
    """Higher is better: accuracy of the task, then its loss."""
    return scores.accuracy[objective], loss_value(scores, objective)


def loss_value(scores: Scores, objective: str) -> float:
    """Higher is better: the negative loss on the correct answers; NaN is worst."""
    loss = scores.loss[objective]
    return -loss if loss == loss else float("-inf")


def _beam_round(round_: Round, scores: dict[Placement, Scores]) -> BeamRound:
    return BeamRound(
        candidates=[PlacementScore(full=placement, scores=scores[placement]) for placement in round_.candidates],
        kept=round_.kept,
    )
