"""The beam search against exhaustive search, and the prefix trie's count of layers."""

import itertools
import random

import pytest
import torch

from megatron_jet.configs.layer_plan import hybrid_plan
from megatron_jet.postnas.beam import beam_search, best_first, extensions
from megatron_jet.postnas.trie import build_trie, count_layers, walk


def table(num_layers: int, budget: int, seed: int) -> dict[tuple[int, ...], float]:
    """A random value for every set of at most `budget` layers."""
    rng = random.Random(seed)
    return {
        chosen: rng.random() for size in range(budget + 1) for chosen in itertools.combinations(range(num_layers), size)
    }


@pytest.mark.parametrize("seed", range(5))
def test_wide_beam_is_exhaustive(seed):
    values = table(7, 3, seed)
    rounds = beam_search(lambda sets: [values[s] for s in sets], range(7), budget=3, width=35)
    triples = {chosen: value for chosen, value in values.items() if len(chosen) == 3}
    assert rounds[-1].candidates == triples
    assert rounds[-1].kept[0] == max(triples, key=triples.get)


def test_finds_a_joint_optimum_that_is_not_the_two_best_singles():
    # The paper's {15, 20}: the pair (2, 5) is best although 2 is only the third-best single layer and 5 the fourth.
    single = {0: 0.9, 1: 0.8, 2: 0.7, 3: 0.1, 4: 0.1, 5: 0.6}

    def value(chosen):
        return sum(single[layer] for layer in chosen) + (2.0 if chosen == (2, 5) else 0.0)

    rounds = beam_search(lambda sets: [value(s) for s in sets], range(6), budget=2, width=3)
    assert rounds[0].kept == [(0,), (1,), (2,)]
    assert rounds[-1].kept[0] == (2, 5)
    narrow = beam_search(lambda sets: [value(s) for s in sets], range(6), budget=2, width=1)
    assert narrow[-1].kept[0] == (0, 1), "a beam of one is greedy and must miss it"


def test_scores_each_set_once_and_only_extensions_of_kept_ones():
    asked = []

    def score(sets):
        asked.append(list(sets))
        return [-sum(s) for s in sets]

    rounds = beam_search(score, range(5), budget=3, width=2)
    assert [len(batch) for batch in asked] == [5, 7, 5]
    assert all(len(set(batch)) == len(batch) for batch in asked)
    assert asked[1] == extensions(rounds[0].kept, range(5))
    assert rounds[-1].kept[0] == (0, 1, 2)


def test_equal_values_prefer_earlier_layers_and_later_entries_decide():
    assert best_first({(2,): 1.0, (0,): 1.0, (1,): 0.5}) == [(0,), (2,), (1,)]
    assert best_first({(0,): (0.5, -2.0), (1,): (0.5, -1.0)}) == [(1,), (0,)]


def test_budget_zero_and_excluded_layers():
    assert beam_search(lambda sets: 1 / 0, range(4), budget=0, width=2) == []
    rounds = beam_search(lambda sets: [s[0] for s in sets], [1, 3], budget=1, width=5)
    assert rounds[0].kept == [(3,), (1,)]


def test_walk_runs_every_distinct_prefix_once():
    plans = [hybrid_plan(5, "gla", full) for full in [(), (0,), (2,), (4,), (2, 4), (0, 1, 2, 3, 4)]]
    plans.append(plans[2])  # equal plans share everything
    prefixes = {plan[:depth] for plan in plans for depth in range(1, 6)}
    seen, ended = [], {}

    def run_layer(depth, entry, path):
        assert len(path) == depth
        seen.append((*path, entry))
        return (*path, entry)

    walk(build_trie(plans), (), run_layer, lambda index, path: ended.__setitem__(index, path))
    assert sorted(seen) == sorted(prefixes)
    assert ended == dict(enumerate(plans))
    assert count_layers(build_trie(plans)) == len(prefixes) < sum(map(len, plans))


def test_walk_leaves_shared_hidden_states_alone():
    """Siblings get the same tensor; a layer that wrote into it would change its sibling's scores."""
    plans = [("a", "b"), ("a", "c"), ("b", "b")]
    weight = {"a": 2.0, "b": 3.0, "c": 5.0}
    out = {}
    walk(
        build_trie(plans),
        torch.ones(2),
        lambda depth, entry, hidden: hidden * weight[entry],
        lambda index, hidden: out.__setitem__(index, hidden.tolist()),
    )
    assert out == {0: [6.0, 6.0], 1: [10.0, 10.0], 2: [9.0, 9.0]}
