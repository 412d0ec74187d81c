"""Who wins a selection stage, and what is on the Pareto front."""

import pytest

from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.results import CandidateResult, Measured, Scores
from megatron_jet.configs.stages import ThroughputConfig
from megatron_jet.postnas.ranking import mean_accuracy, rank_by_accuracy, rank_within_throughput

MEASURED = ThroughputConfig(mode="measured", contexts=(64, 256), tie=0.03)


def candidate(name: str, accuracy: float, speed: float, *, analytic: float = 1.0, ablation: bool = False):
    return CandidateResult(
        name=name,
        mixer="jet",
        mixer_config={},
        params=1,
        state_bytes=1,
        analytic_flops_per_token=1.0,
        scores=Scores(accuracy={"recall": accuracy, "choice": accuracy}, loss={"text": 1.0}),
        final_losses={},
        tokens=1,
        analytic_tokens_per_second={"64": 1.0, "256": analytic},
        recipe_hash="",
        ablation=ablation,
        measured=Measured(seconds=1.0, generation_tokens_per_second={"64": 1.0, "256": speed}),
    )


def test_blocks_rank_by_accuracy_then_speed_at_the_longest_context():
    ranking = rank_by_accuracy(
        [candidate("a", 0.5, 100), candidate("b", 0.7, 10), candidate("c", 0.70001, 20)], MEASURED
    )
    assert ranking.order == ["c", "b", "a"]
    assert ranking.winner == "c"


def test_an_ablation_cannot_win():
    rows = [candidate("jet_static", 0.9, 100, ablation=True), candidate("jet", 0.8, 100)]
    ranking = rank_by_accuracy(rows, MEASURED)
    assert ranking.order == ["jet_static", "jet"]
    assert ranking.winner == "jet"
    assert "jet_static is an ablation" in ranking.rule


def test_hardware_search_takes_the_most_accurate_at_equal_throughput():
    rows = [candidate("fast", 0.5, 100), candidate("tied", 0.6, 97.5), candidate("slow", 0.9, 96)]
    ranking = rank_within_throughput(rows, MEASURED)
    assert ranking.winner == "tied"
    assert ranking.order == ["tied", "fast", "slow"]
    assert ranking.pareto == ["fast", "tied", "slow"]
    assert "within 3%" in ranking.rule


def test_a_candidate_that_fits_into_no_memory_is_the_slowest():
    """It has no figure at that context; the stage must not end in this after the training."""
    large = candidate("large", 0.9, 1)
    large = large.replace(measured=Measured(seconds=1.0, generation_tokens_per_second={"64": 1.0}))
    ranking = rank_within_throughput([large, candidate("small", 0.5, 100)], MEASURED)
    assert (ranking.winner, ranking.order) == ("small", ["small", "large"])
    assert rank_by_accuracy([large, candidate("small", 0.5, 100)], MEASURED).winner == "large"


def test_analytic_mode_reads_no_clock():
    rows = [candidate("a", 0.5, 1, analytic=100), candidate("b", 0.9, 100, analytic=50)]
    assert rank_within_throughput(rows, MEASURED.replace(mode="analytic")).winner == "a"
    assert rank_within_throughput(rows, MEASURED).winner == "b"


@pytest.mark.parametrize("clock", [(3, 2, 1), (1, 3, 2), (2, 1, 3)])
def test_the_tiny_search_chooses_the_same_in_a_slow_spell(clock):
    """Timings of one machine at three hours, each with another order of the sizes."""
    rows = [
        candidate(name, accuracy, 100.0 * speed, analytic=analytic)
        for name, accuracy, analytic, speed in zip("abc", (0.90, 0.80, 0.95), (99.0, 100.0, 90.0), clock)
    ]
    settings = tiny().hardware_search.throughput.replace(contexts=(256,))
    ranking = rank_within_throughput(rows, settings)
    assert (ranking.order, ranking.pareto) == (["a", "b", "c"], ["b", "a", "c"])
    assert "of the best analytic generation throughput" in ranking.rule


def test_front_leaves_out_what_is_beaten_in_both():
    rows = [candidate("a", 0.9, 50), candidate("beaten", 0.8, 40), candidate("b", 0.5, 90), candidate("tie", 0.5, 80)]
    assert rank_by_accuracy(rows, MEASURED).pareto == ["b", "a"]


def test_mean_accuracy_is_over_tasks():
    assert mean_accuracy(Scores(accuracy={"recall": 0.2, "choice": 0.6}, loss={})) == pytest.approx(0.4)
