"""Shards are read ahead, and nobody can tell by what comes out."""

import threading

import numpy as np
import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.data import reader as reader_module
from megatron_jet.data.index import DataIndex, SourceInfo, SplitInfo
from megatron_jet.data.packing import Position, WindowStream
from megatron_jet.data.shards import Sample, ShardWriter

SHARDS, SAMPLES = 5, 6


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Five shards with six samples of four tokens each, all different: (directory, index)."""
    writer = ShardWriter(tmp_path, "train", "text", vocab_size=512)
    for number in range(SHARDS * SAMPLES):
        writer.add(Sample(np.arange(4) + 4 * number), str(number))
        if number % SAMPLES == SAMPLES - 1:
            writer.close()
    split = SplitInfo(sources={"text": 4 * SHARDS * SAMPLES}, shards=writer.shards)
    sources = {"text": SourceInfo(packing="stream", metric="loss")}
    index = DataIndex(
        vocab_size=512, end_of_text=511, seq_length=8, tokenizer_hash="", sources=sources, splits={"train": split}
    )
    return tmp_path, index


def stream(shards, seed=3) -> WindowStream:
    return WindowStream(*shards, "train", "text", 4, seed)


def windows(stream: WindowStream, count: int) -> list[tuple]:
    return [tuple(stream.next()[0]) for _ in range(count)]


@pytest.mark.parametrize("seed", [None, 3])
def test_every_token_comes_once_per_epoch_and_in_the_same_order_without_reading_ahead(shards, monkeypatch, seed):
    ahead = windows(stream(shards, seed), 3 * SHARDS * SAMPLES)
    assert len(set(ahead[: SHARDS * SAMPLES])) == SHARDS * SAMPLES
    monkeypatch.setattr(reader_module.ShardReader, "read_ahead", lambda *args: None)
    assert windows(stream(shards, seed), 3 * SHARDS * SAMPLES) == ahead


def test_shards_are_read_by_a_thread_while_the_last_one_is_used(shards, monkeypatch):
    readers, real = [], reader_module.read_shard

    def read(directory, shard):
        readers.append(threading.current_thread())
        return real(directory, shard)

    monkeypatch.setattr(reader_module, "read_shard", read)
    one = stream(shards)
    windows(one, SAMPLES // 2)
    assert readers == [threading.main_thread()]
    windows(one, 2 * SHARDS * SAMPLES)
    assert threading.main_thread() not in readers[1:] and len(readers) <= 2 * SHARDS + 2


def test_going_on_from_a_position_is_not_disturbed_by_what_was_read_ahead(shards):
    expected = windows(stream(shards), 2 * SHARDS * SAMPLES)
    one = stream(shards)
    windows(one, SAMPLES - 1)  # the second shard is on its way
    for start in (2 * SAMPLES + 1, 4 * SAMPLES, 0):
        one.position = Position(shard=start // SAMPLES, sample=start % SAMPLES)
        assert windows(one, 9) == expected[start : start + 9]


def test_a_damaged_shard_is_named_where_it_is_needed(shards):
    one = stream(shards)
    order = [window[0] // (4 * SAMPLES) for window in windows(stream(shards), SHARDS * SAMPLES)][::SAMPLES]
    (shards[0] / shards[1].splits["train"].shards[order[1]].path).write_bytes(b"nothing")
    windows(one, SAMPLES)
    with pytest.raises(UserError, match="is damaged"):
        one.next()


def test_orders_are_drawn_once_per_epoch_and_shard(shards, monkeypatch):
    """Not for every sample: it takes longer than reading it when there are thousands of shards."""
    draws, real = [], reader_module.ShardReader._order
    monkeypatch.setattr(reader_module.ShardReader, "_order", lambda *args: draws.append(args) or real(*args))
    windows(stream(shards), SHARDS * SAMPLES)
    assert len(draws) <= SHARDS + 2
