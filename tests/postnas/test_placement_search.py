"""The placement search with a scorer that knows the truth: right answer, shared work, resume after a kill."""

import itertools

import pytest

from megatron_jet.configs.layer_plan import full_layers
from megatron_jet.configs.results import Scores
from megatron_jet.configs.stages import PlacementConfig
from megatron_jet.configs.training import LossConfig, TrainingConfig
from megatron_jet.postnas.placement_search import PlacementSearch
from megatron_jet.postnas.scoring import ScoredPlans
from megatron_jet.postnas.trie import build_trie, count_layers

LAYERS = 6
NEEDED = (1, 4)  # recall needs exactly these two, and choice a window at layer 3


def settings(**changes) -> PlacementConfig:
    training = TrainingConfig(steps=1, global_batch_size=1, seq_length=8, loss=LossConfig(kl=1.0))
    base = PlacementConfig(training=training, full_layers={0: 1}, budget=2, beam_width=2, swa_budget=1, swa_window=4)
    return base.replace(**changes)


class Truth:
    """Scores plans by a planted rule and counts what it is asked."""

    def __init__(self, die_at: int | None = None):
        self.calls = 0
        self.plans = []
        self.die_at = die_at

    def __call__(self, plans) -> ScoredPlans:
        self.calls += 1
        if self.calls == self.die_at:
            raise KeyboardInterrupt
        self.plans += plans
        return ScoredPlans(
            scores=[self.scores(plan) for plan in plans],
            layer_forwards=count_layers(build_trie(plans)),
            layer_forwards_naive=sum(map(len, plans)),
        )

    def scores(self, plan) -> Scores:
        full = full_layers(plan)
        accuracy = 0.1 + 0.3 * len(set(full) & set(NEEDED)) + (0.3 if set(NEEDED) <= set(full) else 0.0)
        choice = 2.0 - (1.5 if plan[3] == "swa:4" else 0.0) - 0.1 * len(full)
        return Scores(accuracy={"recall": accuracy}, loss={"recall": 1 - accuracy, "choice": choice})


def search(directory, truth, **changes) -> PlacementSearch:
    return PlacementSearch(settings=settings(**changes), num_layers=LAYERS, directory=directory, score=truth)


def test_finds_the_planted_placement_and_window(tmp_path):
    truth = Truth()
    found = search(tmp_path, truth).run()
    assert found.full == NEEDED
    assert found.swa == (3,)
    best = max(
        itertools.combinations(range(LAYERS), 2), key=lambda full: truth.scores(plan_of(full)).accuracy["recall"]
    )
    assert found.full == best
    singles = {row.full[0]: row.scores.accuracy["recall"] for row in found.heat_map}
    assert {layer for layer, accuracy in singles.items() if accuracy > 0.3} == set(NEEDED)
    assert found.scores.all_full.accuracy["recall"] == pytest.approx(1.0)
    assert found.scores.all_linear.accuracy["recall"] == pytest.approx(0.1)


def plan_of(full):
    return tuple("attn" if layer in full else "gla" for layer in range(LAYERS))


def test_every_plan_is_scored_once_and_the_work_is_counted(tmp_path):
    truth = Truth()
    found = search(tmp_path, truth).run()
    assert len(set(truth.plans)) == len(truth.plans)
    assert found.layer_forwards_naive == LAYERS * len(truth.plans)
    assert found.layer_forwards < 0.85 * found.layer_forwards_naive
    # Heat map and extremes, pairs (singles are known from the heat map), windows.
    assert truth.calls == 3


def test_windows_are_placed_around_the_fixed_full_layers(tmp_path):
    truth = Truth()
    found = search(tmp_path, truth, swa_budget=2).run()
    windowed = [plan for plan in truth.plans if "swa:4" in plan]
    assert windowed and all(full_layers(plan) == NEEDED for plan in windowed)
    assert 3 in found.swa and len(found.swa) == 2


@pytest.mark.parametrize("die_at", [1, 2, 3])
def test_a_search_killed_in_any_round_ends_the_same(tmp_path, die_at):
    undisturbed = search(tmp_path / "a", Truth()).run()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "b", Truth(die_at=die_at)).run()
    again = Truth()
    assert search(tmp_path / "b", again).run() == undisturbed
    assert again.calls == 3 - (die_at - 1), "finished rounds must not be scored again"


def test_no_budget_means_all_linear(tmp_path):
    found = search(tmp_path, Truth(), budget=0, swa_budget=0).run()
    assert (found.full, found.swa, found.beam, found.swa_beam) == ((), (), [], [])
    assert len(found.heat_map) == LAYERS
