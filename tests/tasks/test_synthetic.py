"""Samples hold what their docstrings promise: answers follow from the context, and nothing else tells them."""

import numpy as np
import pytest

from megatron_jet.tasks import synthetic
from megatron_jet.tasks import vocabulary as vocab


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_recall_answers_are_the_values_of_their_keys():
    tokens, mask = synthetic.recall(rng(), 20, num_pairs=24, num_queries=40)
    assert tokens.shape == mask.shape == (20, synthetic.recall_length(24, 40))
    for row, answers in zip(tokens, mask, strict=True):
        pairs = dict(zip(row[1:49:2], row[2:49:2], strict=True))
        assert len(pairs) == 24  # keys differ
        assert answers.sum() == 40
        for position in np.flatnonzero(answers):
            assert row[position] == pairs[row[position - 1]]


def test_recall_queries_and_values_are_independent():
    """Values say nothing about keys, and having been asked says nothing about being asked again."""
    tokens, _ = synthetic.recall(rng(1), 4000, num_pairs=8, num_queries=16)
    keys, values = tokens[:, 1:17:2] - vocab.KEYS, tokens[:, 2:17:2] - vocab.VALUES
    same_class = (values // 4 == keys % 16).mean()
    assert same_class == pytest.approx(1 / 16, abs=4 * np.sqrt(1 / 16 * 15 / 16 / keys.size))
    asked = tokens[:, 18::2]
    repeats = (asked[:, 1:] == asked[:, :-1]).mean()
    assert repeats == pytest.approx(1 / 8, abs=4 * np.sqrt(1 / 8 * 7 / 8 / asked[:, 1:].size))


def test_hinted_recall_values_come_from_the_class_of_their_key():
    tokens, _ = synthetic.recall(rng(2), 50, num_pairs=8, num_queries=16, num_keys=16, hint=1.0)
    keys, values = tokens[:, 1:17:2] - vocab.KEYS, tokens[:, 2:17:2] - vocab.VALUES
    assert keys.max() < 16
    assert (values // 4 == keys).all()


def test_choice_answers_are_the_letters_of_the_facts():
    tokens, mask = synthetic.choice(rng(3), 30, num_questions=21)
    facts = synthetic.fact_table()
    questions = tokens.reshape(-1, synthetic.CHOICE_LENGTH)
    assert (mask.reshape(questions.shape).nonzero()[1] == 11).all()
    letters = []
    for question in questions:
        options = question[2:9:2] - vocab.ATTRIBUTES
        assert len(set(options)) == 4 and options.min() >= 0 and options.max() < vocab.NUM_ATTRIBUTES
        truth = facts[question[10] - vocab.ENTITIES]
        letter = question[11] - vocab.LETTERS
        assert options[letter] == truth and question[1 + 2 * letter] == question[11]
        letters.append(letter)
    counts = np.bincount(letters, minlength=4) / len(letters)
    assert np.abs(counts - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(letters))  # no letter is favoured
    for row in tokens.reshape(30, 21, -1):
        assert len(set(row[:, 10])) == 21  # an earlier answer never gives a later one away


def test_alternating_answers_are_two_back():
    tokens, mask = synthetic.alternating(rng(4), 10, 48, np.arange(vocab.KEYS, vocab.VOCAB_SIZE))
    rows, columns = mask.nonzero()
    assert len(rows) > 10 * 48 / 2
    assert (tokens[rows, columns] == tokens[rows, columns - 2]).all()


def test_repeated_answers_stand_one_period_before():
    tokens, mask = synthetic.repeated(rng(4), 20, 128, np.arange(70) + 30)
    for row, answers in zip(tokens, mask, strict=True):
        period = len(set(row))
        assert 16 <= period <= 64 and row.min() >= 30 and row.max() < 100
        assert (row[period:] == row[:-period]).all()
        assert (np.flatnonzero(answers) == np.arange(period + synthetic.SPAN_LEAD, 128)).all()


def test_copy_answers_stand_in_the_first_half_too():
    text = rng(5).integers(0, 256, 5000)  # random, so that nothing repeats by chance
    tokens, mask = synthetic.copy(rng(6), text, 40, 256)
    for row, answers in zip(tokens, mask, strict=True):
        where = np.flatnonzero(answers)
        assert 13 <= len(where) <= 61 and where[0] >= 128 + synthetic.SPAN_LEAD
        assert (np.diff(where) == 1).all()
        span = row[where[0] - synthetic.SPAN_LEAD : where[-1] + 1]
        first_half = np.lib.stride_tricks.sliding_window_view(row[:128], len(span))
        assert (first_half == span).all(axis=1).any()


def test_seeds_decide_samples():
    for make in (lambda r: synthetic.recall(r, 4, 8, 16), lambda r: synthetic.choice(r, 4, 5)):
        assert (make(rng(7))[0] == make(rng(7))[0]).all()
        assert (make(rng(7))[0] != make(rng(8))[0]).any()


def test_vocabulary_has_no_gaps_and_no_overlaps():
    tokens = vocab.special_tokens()
    assert sorted(tokens.values()) == list(range(vocab.NUM_BYTES, vocab.VOCAB_SIZE))
    assert tokens["<|endoftext|>"] == vocab.END_OF_TEXT and tokens["<|A|>"] == vocab.LETTERS
    assert tokens["<|x47|>"] == vocab.VOCAB_SIZE - 1
