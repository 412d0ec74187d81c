"""Findings say what the data says, also when a paper's finding does not show; curves are read as they are."""

import copy
import json

import pytest

from fake_run import write_fake_run
from megatron_jet.evaluation.report.collect import collect
from megatron_jet.evaluation.report.curves import read_curves, thin
from megatron_jet.evaluation.report.finding import NOISE, SHOWS, SHOWS_NOT, judge, standard_error
from megatron_jet.evaluation.report.findings import findings, measured_findings
from megatron_jet.evaluation.report.plots_placement import spread_out


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return collect(write_fake_run(tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture
def report(original):
    return copy.deepcopy(original)


def verdicts(report) -> dict[str, str]:
    return {row["name"]: row["verdict"] for row in findings(report) + measured_findings(report)}


def set_accuracy(selection, name: str, value: float) -> None:
    candidate = next(c for c in selection["candidates"] if c["name"] == name)
    candidate["scores"]["accuracy"] = dict.fromkeys(candidate["scores"]["accuracy"], value)


def test_all_findings_of_a_whole_run(report):
    assert verdicts(report) == {
        "learned placement": SHOWS,
        "few layers matter": SHOWS,
        "joint optimum": SHOWS_NOT,
        "tasks need different layers": SHOWS,
        "block selection": SHOWS,
        "JetBlock": NOISE,
        "dynamic convolution": NOISE,
        "sizes at equal cache": NOISE,
        "accuracy kept": NOISE,
        "generation speed": SHOWS,
        "speed at equal cache": SHOWS,
    }
    for row in findings(report):
        assert bool(row["why_not"]) == (row["verdict"] != SHOWS) or row["name"] == "joint optimum"


def test_learned_placement_follows_the_scores_after_training(report):
    rows = {row["name"]: row for row in report["placement"]["comparison"]}
    rows["learned"]["after"], rows["uniform"]["after"] = rows["uniform"]["after"], rows["learned"]["after"]
    assert verdicts(report)["learned placement"] == SHOWS_NOT
    text = next(row for row in findings(report) if row["name"] == "learned placement")["here"]
    assert "63.0% with full attention in layers {2, 5}, 96.0% with the uniform {2, 6} declared beforehand" in text
    rows["learned"]["after"] = rows["uniform"]["after"]
    assert verdicts(report)["learned placement"] == NOISE
    rows["learned"]["after"] = None
    assert verdicts(report)["learned placement"] == SHOWS
    text = findings(report)[0]["here"]
    assert "straight from the supernet after 120 steps" in text and "None of these was trained by itself" in text


def learned_placement(report) -> dict[str, str]:
    return next(row for row in findings(report) if row["name"] == "learned placement")


def comparison(report) -> dict[str, dict]:
    return {row["name"]: row for row in report["placement"]["comparison"]}


def test_a_placement_that_only_beats_the_declared_one_beats_nothing(report):
    """A uniform placement that nobody declared may do as well, and then no sentence says otherwise."""
    rows = comparison(report)
    assert learned_placement(report)["verdict"] == SHOWS
    rows["uniform phase 0"]["after"] = copy.deepcopy(rows["learned"]["after"])
    tied = learned_placement(report)
    assert tied["verdict"] == NOISE and "cannot be told from chance" in tied["why_not"]
    assert "63.0% with the uniform {2, 6} declared beforehand" in tied["here"]
    assert "The best of 2 uniform ones is {0, 4} with 96.0%." in tied["here"]
    rows["uniform phase 0"]["after"]["accuracy"]["recall"] = 0.999
    rows["learned"]["after"]["accuracy"]["recall"] = 0.5
    assert learned_placement(report)["verdict"] == SHOWS_NOT
    rows["uniform phase 0"]["after"]["accuracy"]["recall"] = 0.1
    rows["learned"]["after"]["accuracy"]["recall"] = 0.96
    found = learned_placement(report)
    assert found["verdict"] == SHOWS and "That is the best of 2 uniform ones." in found["here"]


def test_a_search_that_finds_a_uniform_placement_has_beaten_none(report):
    rows = comparison(report)
    same = rows["uniform phase 0"]
    rows["learned"]["full"], same["after"] = same["full"], rows["learned"]["after"]
    found = learned_placement(report)
    assert found["verdict"] == NOISE and "The search chose layers that are evenly spaced." in found["here"]
    rows["learned"]["full"], rows["learned"]["after"] = rows["uniform"]["full"], rows["uniform"]["after"]
    assert "evenly spaced as declared." in learned_placement(report)["here"]


def test_where_a_uniform_placement_is_ahead_is_said(report):
    rows = comparison(report)
    assert "ahead" not in learned_placement(report)["here"]
    better = rows["uniform phase 0"]["after"] = copy.deepcopy(rows["uniform"]["after"])
    better["accuracy"]["choice"], better["loss"]["text"] = 0.99, 1.25
    learned = rows["learned"]["after"]
    assert (
        f"A uniform one is ahead in choice ({{0, 4}}: 99.0% against {100 * learned['accuracy']['choice']:.1f}%); "
        f"text loss ({{0, 4}}: 1.250 against {learned['loss']['text']:.3f} nats)."
    ) in learned_placement(report)["here"]
    rows["all_linear"]["after"] = copy.deepcopy(rows["all_linear"]["before"])
    rows["all_linear"]["after"]["accuracy"]["recall"] = 0.021
    assert "Without full attention: 2.1%." in learned_placement(report)["here"]


def test_every_figure_comes_with_how_long_its_model_was_trained(report):
    """`learned beats uniform` after 20 steps is another sentence than after 2,000."""
    report["steps"] = {
        "placement": 1111,
        "comparison": 7,
        "block_selection": 33,
        "new_block": 44,
        "hardware_search": 1,
        "stage1": 500,
        "stage2": 55,
    }
    report["placement"]["heat_map"][4]["scores"]["accuracy"]["recall"] = 0.50  # a joint optimum with figures
    said = {row["name"]: row["here"] for row in findings(report)}
    assert all("%" in here for here in said.values())
    for name, length in {
        "learned placement": "after 7 steps of training each",
        "few layers matter": "straight from the supernet after 1,111 steps",
        "joint optimum": "straight from the supernet after 1,111 steps",
        "tasks need different layers": "straight from the supernet after 1,111 steps",
        "block selection": "after 33 steps",
        "JetBlock": "after 44 steps",
        "dynamic convolution": "after 44 steps",
        "sizes at equal cache": "after 1 step)",
        "accuracy kept": "after 555 steps of stage 1 and 2",
    }.items():
        assert length in said.pop(name), name
    assert said == {}
    row = learned_placement(report)
    here = row["here"]
    assert row["paper"].endswith("tested here: whether it learns faster."), "what the verdict is about"
    assert "how fast a placement learns, not where longer training ends" in here


def test_joint_optimum_compares_with_the_best_single_layers(report):
    placement = report["placement"]
    placement["heat_map"][4]["scores"]["accuracy"]["recall"] = 0.50  # now layers 2 and 4 are the best alone
    assert verdicts(report)["joint optimum"] == SHOWS  # {2, 5} has 89%, {2, 4} has 65%
    for candidate in placement["beam"][1]["candidates"]:
        if candidate["full"] == [2, 4]:
            candidate["scores"]["accuracy"]["recall"] = 0.88
    assert verdicts(report)["joint optimum"] == NOISE
    placement["beam"] = placement["beam"][:1]
    row = next(row for row in findings(report) if row["name"] == "joint optimum")
    assert row["verdict"] == NOISE and "did not score together" in row["here"]


def test_few_layers_and_tasks(report):
    for row in report["placement"]["heat_map"]:
        row["scores"]["accuracy"]["recall"] = 0.5
        row["scores"]["loss"]["choice"] = 1.0
    found = verdicts(report)
    assert found["few layers matter"] == NOISE
    assert found["tasks need different layers"] == SHOWS_NOT  # layer 0 is first in both
    report["placement"]["swa_objective"] = "recall"
    assert "tasks need different layers" not in verdicts(report)


def test_blocks(report):
    set_accuracy(report["block_selection"], "gated_delta_net", 0.95)
    assert verdicts(report)["block selection"] == SHOWS
    set_accuracy(report["block_selection"], "gla", 0.999)
    set_accuracy(report["block_selection"], "gated_delta_net", 0.5)
    assert verdicts(report)["block selection"] == SHOWS_NOT
    set_accuracy(report["new_block"], "jet", 0.2)
    found = verdicts(report)
    assert found["JetBlock"] == SHOWS_NOT and found["dynamic convolution"] == SHOWS_NOT
    report["new_block"] = None
    found = verdicts(report)
    assert "dynamic convolution" not in found and found["JetBlock"] == SHOWS  # from block_selection: 81% against 50%


def test_sizes(report):
    by_size = sorted(report["hardware_search"]["candidates"], key=lambda c: c["params"])
    set_accuracy(report["hardware_search"], by_size[-1]["name"], 0.99)
    set_accuracy(report["hardware_search"], by_size[0]["name"], 0.60)
    assert verdicts(report)["sizes at equal cache"] == SHOWS
    by_size[0]["measured"]["generation_tokens_per_second"]["2048"] *= 2
    assert verdicts(report)["speed at equal cache"] == SHOWS_NOT
    report["hardware_search"]["throughput_mode"] = "measured"  # whatever ranks
    assert verdicts(report)["speed at equal cache"] == SHOWS_NOT
    by_size[1]["measured"]["generation_tokens_per_second"] = None
    assert "speed at equal cache" not in verdicts(report)


def test_final_model(report):
    for pair in report["comparison"]["accuracy"].values():
        pair["final"] = 0.6
    assert verdicts(report)["accuracy kept"] == SHOWS_NOT
    speeds = report["comparison"]["measured"]["generation_tokens_per_second"]
    for pair in speeds.values():
        pair["ratio"] = 0.9
    assert verdicts(report)["generation speed"] == SHOWS_NOT
    speeds["1024"]["ratio"], speeds["16384"]["ratio"] = 3.0, 1.5  # faster, but less so the longer
    assert verdicts(report)["generation speed"] == SHOWS_NOT


@pytest.mark.parametrize(
    ("lost", "error", "verdict"),
    [(0.0, 0.002, SHOWS), (0.015, 0.002, SHOWS), (0.03, 0.002, SHOWS_NOT), (0.015, 0.05, NOISE), (0.3, 0.25, NOISE)],
)
def test_accuracy_counts_as_kept_only_where_the_run_can_tell(report, lost, error, verdict):
    """`lost` of the mean accuracy, with a standard error per model and task of `error` * sqrt(tasks / 2)."""
    pairs = report["comparison"]["accuracy"]
    scores = report["comparison"]["scores"]
    for task, pair in pairs.items():
        pair["teacher"], pair["final"] = 0.9, 0.9 - lost
        for side in scores.values():
            side["error"][task] = error * (len(pairs) / 2) ** 0.5
    report["samples"]["evaluate"] = 10_000
    assert verdicts(report)["accuracy kept"] == verdict


def test_the_text_that_a_hybrid_loses_is_in_the_finding(report):
    """It has no accuracy, so no mean of accuracies shows it."""
    report["comparison"]["loss"]["text"] = {"teacher": 1.39, "final": 1.62}
    here = next(row for row in findings(report) if row["name"] == "accuracy kept")["here"]
    assert "Loss on text 1.390 to 1.620 nats per token." in here


def test_no_findings_without_data(report):
    empty = dict.fromkeys(("placement", "block_selection", "new_block", "hardware_search", "comparison"))
    assert findings({**report, **empty}) == [] and measured_findings({**report, **empty}) == []


def test_standard_error_of_a_difference():
    accuracy = {"a": 0.5, "b": 1.0}
    one = {"accuracy": accuracy, "error": {"a": 0.03, "b": 0.0}}
    other = {"accuracy": accuracy, "error": {"a": 0.04, "b": 0.0}}
    assert standard_error(one, other, ["a"], 1000) == pytest.approx(0.05)
    # Without a wrong answer among 10 sequences the error is taken as 0.05 on either side: sqrt(0.05^2 + 0.05^2).
    assert standard_error(one, other, ["b"], 10) == pytest.approx(0.0707107, rel=1e-6)
    # The mean of two tasks: sqrt(0.03^2 + 0.04^2 + 2 * 0.0005^2) / 2.
    assert standard_error(one, other, ["a", "b"], 1000) == pytest.approx(0.0250025, rel=1e-5)
    # Results without errors: shares of one half over 100 sequences, sqrt(2 * 0.25 / 100).
    bare = {"accuracy": accuracy, "error": {}}
    assert standard_error(bare, bare, ["a"], 100) == pytest.approx(0.0707107, rel=1e-6)
    # Of 100 sequences asked for, the data had 25.
    few = bare | {"sequences": {"a": 25}}
    assert standard_error(few, few, ["a"], 100) == pytest.approx(2 * 0.0707107, rel=1e-6)
    assert judge(0.2, 0.1) == SHOWS and judge(0.19, 0.1) == NOISE
    assert judge(-0.2, 0.1) == SHOWS_NOT and judge(-0.19, 0.1) == NOISE and judge(0.0, 0.0) == SHOWS_NOT


def test_curves_keep_losses_only_and_survive_a_cut_line(tmp_path):
    path = tmp_path / "stages" / "stage1" / "jobs" / "student" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    rows = [
        {"step": 1, "loss": 2.0, "kl": 1.5, "tokens_per_second": 100.0, "split": "train"},
        {"step": 2, "loss": None, "kl": 1.0, "split": "train"},
        {"step": 2, "loss": 1.9, "split": "validation"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo')
    assert read_curves(tmp_path) == {
        "stage1/student": {
            "train": {"loss": [[1, 2.0]], "kl": [[1, 1.5], [2, 1.0]]},
            "validation": {"loss": [[2, 1.9]]},
        }
    }


def test_thinned_curves_keep_their_mean_and_ends():
    points = [[step, float(step)] for step in range(1000)]
    short = thin(points, 100)
    assert len(short) == 100 and short[0] == [4.5, 4.5] and short[-1] == [994.5, 994.5]
    assert thin(points[:100], 100) == points[:100]
    assert len(thin(points[:101], 100)) == 100


def test_labels_are_spread_out_in_order():
    assert spread_out([1.0, 0.99, 0.2], 0.1) == [1.0, 0.9, 0.2]
    assert spread_out([0.2, 1.0], 0.1) == [0.2, 1.0]
    assert spread_out([], 0.1) == []
