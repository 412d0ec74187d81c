"""Layer plans: what they may hold, and the placements searches start from."""

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.layer_plan import (
    check_plan,
    full_layers,
    hybrid_plan,
    linear_layers,
    split_entry,
    uniform_phases,
    uniform_placement,
)
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS, jet_nemotron_2b_model, qwen2_5_1_5b


def test_entries():
    assert split_entry("jet") == ("jet", None)
    assert split_entry("swa:1152") == ("swa", 1152)


@pytest.mark.parametrize(
    "entry", ["swa", "swa:", "swa:0", "swa:-1", "swa:x", "jet:3", "attn:64", "mamba", "", "swa:1.5"]
)
def test_bad_entries(entry):
    with pytest.raises(UserError):
        split_entry(entry)


def test_plan_of_the_wrong_length():
    with pytest.raises(UserError, match="layer plan has 3 entries but the model has 4 layers"):
        check_plan(("jet", "attn", "jet"), 4)
    with pytest.raises(UserError, match="layer plan has 2 entries"):
        qwen2_5_1_5b().with_plan(("attn", "attn"))


def test_hybrid_plan():
    plan = hybrid_plan(6, "gla", (2, 4), {1: 64})
    assert plan == ("gla", "swa:64", "attn", "gla", "attn", "gla")
    assert full_layers(plan) == (2, 4) and linear_layers(plan) == (0, 3, 5)
    with pytest.raises(UserError, match="layer 6 does not exist"):
        hybrid_plan(6, "gla", (6,))


def test_plan_that_names_a_mixer_without_sizes():
    with pytest.raises(UserError, match="mixers.gla is not given"):
        qwen2_5_1_5b().with_plan(("gla",) * 28)


@pytest.mark.parametrize(
    ("layers", "budget", "expected"),
    [(8, 2, (2, 6)), (28, 2, (7, 21)), (8, 1, (4,)), (8, 0, ()), (8, 8, tuple(range(8)))],
)
def test_uniform_placement_centres_its_spans(layers, budget, expected):
    assert uniform_placement(layers, budget) == expected


def test_uniform_budget_that_does_not_fit():
    with pytest.raises(UserError, match="budget 9 does not fit"):
        uniform_placement(8, 9)


def test_all_phases_of_the_uniform_baseline():
    assert uniform_phases(8, 2) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    for layers, budget in ((8, 3), (28, 2), (7, 2)):
        phases = uniform_phases(layers, budget)
        assert all(len(set(phase)) == budget and max(phase) < layers for phase in phases)
        assert uniform_placement(layers, budget, 0.0)[0] == 0
    assert uniform_phases(8, 0) == []


def test_published_models_know_their_layers():
    assert full_layers(jet_nemotron_2b_model().layer_plan) == (14, 19)
    for name, build in KNOWN_MODELS.items():
        model = build()
        assert len(model.layer_plan) == model.num_layers, name


def test_layout_that_does_not_divide_the_heads():
    model = jet_nemotron_2b_model()
    model.check_parallel(2, 2)
    with pytest.raises(UserError, match="heads do not divide by tensor_parallel=4"):
        model.check_parallel(4)
    with pytest.raises(UserError, match="num_layers=28 does not divide by pipeline_parallel=3"):
        model.check_parallel(1, 3)
