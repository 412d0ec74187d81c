"""The loader: every token once per epoch, the same sequences for any number of ranks, exact resume."""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import DataConfig
from megatron_jet.data.index import read_index
from megatron_jet.data.loader import DataLoader
from megatron_jet.data.packing import WindowStream
from megatron_jet.data.shards import read_shard


def loader(path, *, split="train", rank=0, size=1, rows=4, seed=5, blend=None, seq_length=96):
    data = DataConfig(path=str(path), blend=blend)
    return DataLoader(data, split, seq_length=seq_length, micro_batch_size=rows, dp_rank=rank, dp_size=size, seed=seed)


def source_tokens(path, source):
    index = read_index(path)
    return [
        sample.tokens
        for shard in index.splits["train"].shards
        if shard.source == source
        for sample in read_shard(path, shard)
    ]


def test_an_epoch_of_a_stream_holds_every_token_once(prepared):
    documents = source_tokens(prepared, "text")
    stream = WindowStream(prepared, read_index(prepared), "train", "text", 50, seed=1)
    total = sum(map(len, documents))
    tokens = np.concatenate([stream.next()[0] for _ in range(total // 50)])
    assert stream.position.epoch == 0 or stream.position.sample == stream.position.offset == 0
    ends = np.flatnonzero(tokens == 256) + 1
    whole = [part.tobytes() for part in np.split(tokens, ends)[:-1]]
    assert len(set(whole)) == len(whole)
    assert set(whole) <= {document.astype(np.int64).tobytes() for document in documents}
    assert len(whole) >= len(documents) - 1  # the last document may be cut by the end of the test


def test_whole_samples_are_never_cut_and_padding_is_not_scored(prepared):
    samples = {sample.tobytes() for sample in source_tokens(prepared, "qa")}
    stream = WindowStream(prepared, read_index(prepared), "train", "qa", 60, seed=1)
    seen = []
    while stream.position.epoch == 0:
        tokens, mask = stream.next()
        if stream.position.epoch:
            break
        last = np.flatnonzero(mask)[-1]
        assert (tokens[last:] == 256).all()
        assert not mask[last + 1 :].any()
        parts = np.split(tokens[: last + 1], np.flatnonzero(tokens[: last + 1] == 256) + 1)[:-1]
        seen += [part.astype(np.uint16).tobytes() for part in parts]
    assert len(seen) == len(set(seen))
    assert set(seen) <= samples


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_sequences_of_one_process(prepared, size):
    single = loader(prepared, rows=4)
    ranks = [loader(prepared, rank=rank, size=size, rows=4 // size) for rank in range(size)]
    for _ in range(30):
        batch = single.next_batch()
        parts = [part.next_batch() for part in ranks]
        for key in batch:
            assert torch.equal(batch[key], torch.cat([part[key] for part in parts])), key
    assert all(part.state_dict() == single.state_dict() for part in ranks)


def test_resume_goes_on_with_the_very_next_batch(prepared):
    first = loader(prepared)
    for _ in range(23):
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(prepared)
    second.load_state_dict(state)
    for _ in range(40):  # past the end of an epoch
        expected, found = first.next_batch(), second.next_batch()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_labels_are_the_next_tokens_and_the_mask_belongs_to_them(prepared):
    batch = loader(prepared, blend={"choice": 1.0}).next_batch()
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    answers = batch["labels"][batch["loss_mask"] == 1]
    assert ((answers >= 264) & (answers < 268)).all()  # letters only
    assert len(answers) == 4 * (96 // 12)


def test_blend_is_respected_and_seeds_differ(prepared):
    blended = loader(prepared, blend={"text": 3.0, "recall": 1.0}, rows=400)
    share = (blended.next_batch()["source"] == blended.sources.index("text")).float().mean().item()
    assert abs(share - 0.75) < 0.1  # 400 draws: standard deviation 0.02
    a, b = loader(prepared, seed=1).next_batch(), loader(prepared, seed=2).next_batch()
    assert not torch.equal(a["tokens"], b["tokens"])


def test_epochs_have_different_orders(prepared):
    stream = WindowStream(prepared, read_index(prepared), "train", "recall", 97, seed=1)
    epochs = [[stream.next()[0].tobytes() for _ in range(30)] for _ in range(2)]
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


def test_bad_requests_are_named(prepared, tmp_path):
    with pytest.raises(UserError, match="no source 'txt'"):
        loader(prepared, blend={"txt": 1.0})
    with pytest.raises(ValueError, match="give non-negative weights, at least one above 0"):
        loader(prepared, blend={"text": -1.0})
    with pytest.raises(UserError, match="no split 'test'"):
        loader(prepared, split="test")
    with pytest.raises(UserError, match="no index.json"):
        loader(tmp_path)
    with pytest.raises(UserError, match="more than the 33 of a window; raise training.seq_length"):
        loader(prepared, blend={"recall": 1.0}, seq_length=32).next_batch()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_is_named(prepared, tmp_path, damage):
    copy = tmp_path / "data"
    shutil.copytree(prepared, copy)
    shard = copy / "train" / "recall-000000.tar"
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[: len(content) // 2])
    else:
        shard.unlink()
    with pytest.raises(UserError, match="recall-000000.tar is"):
        loader(copy, blend={"recall": 1.0}).next_batch()
