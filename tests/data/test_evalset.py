"""Scores: what accuracy and loss mean, by hand; pieces and merges give the same result."""

import math
import shutil

import pytest
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.data.index import read_index
from megatron_jet.data.shards import read_shard
from megatron_jet.tasks.evalset import EvalSet, Scorer, load_eval_sets


def evalset(metric, choices=None):
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    labels = torch.tensor([[-100, 3, 0], [5, -100, -100]])
    return EvalSet("set", metric, tokens, labels, choices)


def logits_for(predictions, others=()):
    """Logit 2 at the prediction, 1 at `others`, 0 elsewhere, over 8 tokens."""
    logits = torch.zeros(2, 3, 8)
    for row, line in enumerate(predictions):
        for place, token in enumerate(line):
            logits[row, place, list(others)] = 1.0
            logits[row, place, token] = 2.0
    return logits


def test_exact_accuracy_and_loss_by_hand():
    scorer = Scorer(evalset("exact"))
    scorer.update(slice(0, 2), logits_for([[0, 3, 1], [5, 0, 0]]))  # right, wrong, right at the scored places
    result = scorer.result()
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["sequences"] == 2
    normaliser = math.log(math.exp(2) + 7)
    assert result["loss"] == pytest.approx((2 * (normaliser - 2) + normaliser) / 3, abs=1e-6)


def test_choice_looks_only_at_the_choices():
    scorer = Scorer(evalset("choice", [0, 3, 5]))
    # Token 7 has the greatest logit everywhere, and is no choice.
    logits = logits_for([[7, 7, 7], [7, 7, 7]])
    logits[0, 1, 3] = logits[0, 2, 3] = logits[1, 0, 5] = 1.0
    scorer.update(slice(0, 2), logits)
    assert scorer.result()["accuracy"] == pytest.approx(2 / 3)


def test_loss_sets_have_no_accuracy():
    scorer = Scorer(evalset("loss"))
    scorer.update(slice(0, 2), torch.zeros(2, 3, 8))
    assert scorer.result() == {"loss": pytest.approx(math.log(8))}


def test_logits_exist_at_scored_positions_only_and_in_chunks(monkeypatch):
    """Hidden states are one-hot here and the head doubles them, so what comes out is known."""
    monkeypatch.setattr("megatron_jet.tasks.evalset.LOGIT_CHUNK_TOKENS", 2)
    logits, seen = logits_for([[0, 3, 1], [5, 0, 0]]), []

    def head(picked):
        seen.append(picked)
        return 2 * picked

    whole, chunked = Scorer(evalset("exact")), Scorer(evalset("exact"))
    whole.update(slice(0, 2), logits)
    chunked.update_scored(slice(0, 2), logits / 2, head)
    assert chunked.sums() == whole.sums()
    assert [tuple(picked.shape) for picked in seen] == [(2, 8), (1, 8)]
    assert torch.equal(torch.cat(seen), logits[torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0])] / 2)


def test_sequences_without_answers_count_as_none():
    unscored = evalset("exact")
    unscored.labels.fill_(-100)
    scorer = Scorer(unscored)
    scorer.update(slice(0, 2), torch.zeros(2, 3, 8))
    assert scorer.result() == {"loss": 0.0, "accuracy": 0.0, "error": 0.0, "sequences": 0}


def test_pieces_merge_to_the_whole():
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    whole, first, second = (Scorer(evalset("exact")) for _ in range(3))
    whole.update(slice(0, 2), logits)
    first.update(slice(0, 1), logits[:1])
    second.update(slice(1, 2), logits[1:])
    first.merge(second.sums())
    assert first.result() == pytest.approx(whole.result(), abs=1e-12)


def test_eval_sets_hold_the_split_in_order(prepared):
    sets = {item.name: item for item in load_eval_sets(prepared, "heldout")}
    assert set(sets) >= {"text", "recall", "choice", "copy"}
    index = read_index(prepared)
    shard = next(shard for shard in index.splits["heldout"].shards if shard.source == "recall")
    samples = read_shard(prepared, shard)
    recall = sets["recall"]
    for row, sample in zip(recall.tokens, samples):
        assert row[: len(sample.tokens)].tolist() == sample.tokens[: len(row)].tolist()
    scored = recall.labels[0] != -100
    assert scored.sum() == samples[0].mask.sum()
    assert sets["choice"].choices == [264, 265, 266, 267]
    assert sets["text"].metric == "loss"


def test_as_many_sequences_as_asked_for_and_no_more(prepared):
    """There is no hidden limit, and a small number is not read as a large one."""
    few = {item.name: len(item.tokens) for item in load_eval_sets(prepared, "train", samples=5)}
    assert set(few.values()) == {5}
    index = read_index(prepared)
    recall = sum(shard.samples for shard in index.splits["train"].shards if shard.source == "recall")
    everything = {item.name: item for item in load_eval_sets(prepared, "train", samples=100_000)}
    assert len(everything["recall"].tokens) == recall - 1 == 29  # the last one may run into the second pass
    assert len(everything["text"].tokens) > 100


def test_samples_longer_than_an_evaluation_sequence_say_what_to_do(prepared, tmp_path):
    """Data of an earlier version; raising training.seq_length would not help."""
    shutil.copytree(prepared, tmp_path / "old")
    path = tmp_path / "old" / "index.json"
    path.write_text(path.read_text().replace('"seq_length": 96', '"seq_length": 48'))
    with pytest.raises(UserError, match="has 96 tokens, more than the 49 of a window; prepare the data again"):
        load_eval_sets(tmp_path / "old", "heldout")
