"""The standard error of an accuracy counts sequences: answers within one sequence depend on each other."""

import math
import statistics

import pytest
import torch

from megatron_jet.tasks.evalset import IGNORED, EvalSet, Scorer

VOCAB = 4


def scored(correct: torch.Tensor, scored_mask: torch.Tensor) -> Scorer:
    """A scorer fed with logits that are right where `correct` is true. Both [rows, s]."""
    labels = torch.zeros_like(correct, dtype=torch.long).masked_fill(~scored_mask, IGNORED)
    logits = torch.zeros(*correct.shape, VOCAB)
    logits[..., 0] = correct.float() * 2 - 1
    evalset = EvalSet("recall", "exact", torch.zeros_like(labels), labels)
    scorer = Scorer(evalset)
    for row in range(len(labels)):
        scorer.update(slice(row, row + 1), logits[row : row + 1])
    return scorer


def test_one_answer_per_sequence_is_the_usual_error_of_a_share():
    correct = torch.tensor([[True], [False], [True], [True], [False]])
    result = scored(correct, torch.ones_like(correct)).result()
    assert result["accuracy"] == 0.6
    assert result["error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


def test_sequences_that_are_right_or_wrong_as_a_whole_count_once():
    correct = torch.tensor([[True], [False], [True], [True], [False]]).expand(5, 50)
    result = scored(correct, torch.ones_like(correct)).result()
    assert result["error"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


def test_error_is_the_spread_of_repeated_measurements():
    generator = torch.Generator().manual_seed(0)
    accuracies, errors = [], []
    for _ in range(150):
        skill = torch.rand(40, 1, generator=generator)  # of each sequence
        correct = torch.rand(40, 12, generator=generator) < skill
        mask = torch.rand(40, 12, generator=generator) < 0.7  # different numbers of answers
        result = scored(correct, mask).result()
        accuracies.append(result["accuracy"])
        errors.append(result["error"])
    # The spread of 150 draws is known within 1 / sqrt(2 * 149) = 6%; three times that.
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(accuracies), rel=0.18)


def test_merged_parts_give_the_whole():
    generator = torch.Generator().manual_seed(1)
    correct = torch.rand(10, 6, generator=generator) < 0.5
    mask = torch.rand(10, 6, generator=generator) < 0.6
    whole = scored(correct, mask)
    merged = scored(correct[:3], mask[:3])
    merged.merge(scored(correct[3:], mask[3:]).sums())
    assert merged.result() == whole.result()


def test_too_little_to_say():
    assert scored(torch.tensor([[True, False]]), torch.tensor([[True, True]])).result()["error"] == 0.0
