"""Encoding in batches on all cores: the same bytes however many, and no more in memory than a batch or two."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_jet.configs.files import hash_file
from megatron_jet.data import encoder as encoder_module
from megatron_jet.data.documents import Document
from megatron_jet.data.encoder import Encoder, batches
from megatron_jet.data.index import read_index
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.data.shards import read_shard

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Item:
    document: Document


def items(*texts: str) -> list[Item]:
    return [Item(Document(str(number), text)) for number, text in enumerate(texts)]


def prepared_bytes(corpus, byte_tokenizer, out) -> str:
    prepare(Request((str(corpus),), byte_tokenizer, 96), out)
    return hash_file(out / "index.json")


@pytest.mark.parametrize(("documents", "size"), [(1, 1), (3, 1 << 20), (1000, 500)])
def test_bytes_do_not_depend_on_the_batches(corpus, byte_tokenizer, tmp_path, monkeypatch, documents, size):
    before = prepared_bytes(corpus, byte_tokenizer, tmp_path / "one")
    monkeypatch.setattr(encoder_module, "BATCH_DOCUMENTS", documents)
    monkeypatch.setattr(encoder_module, "BATCH_BYTES", size)
    assert prepared_bytes(corpus, byte_tokenizer, tmp_path / "other") == before


def test_bytes_do_not_depend_on_the_number_of_threads(corpus, byte_tokenizer, tmp_path):
    """The library reads its settings once per process."""
    hashes = set()
    for number, own in enumerate(({"TOKENIZERS_PARALLELISM": "false"}, {"RAYON_NUM_THREADS": "3"})):
        out = tmp_path / str(number)
        script = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), str(corpus), str(out)]
        environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"} | own
        subprocess.run([*script, "--tokenizer", str(byte_tokenizer)], env=environment, check=True)
        hashes.add(hash_file(out / "index.json"))
    assert len(hashes) == 1


def test_tokens_are_those_of_one_document_at_a_time(corpus, byte_tokenizer, tmp_path):
    """Questions have two texts each, which must not get mixed up with those of their neighbours."""
    prepare(Request((str(corpus / "questions.jsonl"),), byte_tokenizer, 96), tmp_path / "out")
    encoder = Encoder(byte_tokenizer)
    rows = [json.loads(line) for line in (corpus / "questions.jsonl").read_text().splitlines()]
    alone = lambda text: encoder.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    expected = {(*alone(row["prompt"]), *alone(row["answer"]), encoder.end_of_text) for row in rows}
    index = read_index(tmp_path / "out")
    shards = [shard for split in index.splits.values() for shard in split.shards]
    found = {tuple(sample.tokens.tolist()) for shard in shards for sample in read_shard(tmp_path / "out", shard)}
    assert found == expected


def test_batches_are_bounded_and_a_large_document_comes_alone(monkeypatch):
    monkeypatch.setattr(encoder_module, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(encoder_module, "BATCH_BYTES", 10)
    texts = ["a", "b", "c", "d", "eeee", "ffffff", "é" * 20, "g", "hhhhhhhhh", "i", ""]
    found = [[item.document.text for item in batch] for batch in batches(iter(items(*texts)))]
    assert found == [["a", "b", "c"], ["d", "eeee"], ["ffffff"], ["é" * 20], ["g", "hhhhhhhhh"], ["i", ""]]


def test_no_more_is_read_ahead_than_two_batches(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(encoder_module, "BATCH_DOCUMENTS", 4)
    read = []

    def documents():
        for item in items(*map(str, range(100))):
            read.append(item)
            yield item

    written = 0
    for item, sample in Encoder(byte_tokenizer).encode(documents()):
        written += 1
        assert len(read) - written <= 2 * 4 + 1
        assert len(sample.tokens) == len(item.document.text) + 1
    assert written == 100


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_documents_are_neither_cut_nor_padded(byte_tokenizer, tmp_path, setting):
    """Fast tokenizers are often saved with either, and padding goes by the longest of a batch."""
    shutil.copytree(byte_tokenizer, tmp_path / "tokenizer")
    encoder = Encoder(byte_tokenizer)
    if setting == "truncation":
        encoder.tokenizer.enable_truncation(4)
    else:
        encoder.tokenizer.enable_padding()
    encoder.tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    again = Encoder(tmp_path / "tokenizer")
    assert [len(sample.tokens) for _, sample in again.encode(items("a" * 9, "bb"))] == [10, 3]
