"""Preparation: nothing in two splits, same bytes for the same input, bad input named in one line."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file
from megatron_jet.data import prepare as prepare_module
from megatron_jet.data.index import SPLITS, read_index
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.data.shards import ShardWriter, read_shard
from megatron_jet.tasks.evalset import load_eval_sets

ROOT = Path(__file__).resolve().parents[2]


def test_splits_share_no_document_and_no_task_sample(prepared):
    index = read_index(prepared)
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        for shard in index.splits[split].shards:
            for sample in read_shard(prepared, shard):
                key = sample.tokens.tobytes()
                assert seen.setdefault(key, split) == split
    assert {shard.source for shard in index.splits["train"].shards} == {"text", "qa", "recall", "choice", "copy"}


def test_same_input_gives_the_same_bytes(prepared, corpus, byte_tokenizer, tmp_path):
    request = Request((str(corpus),), byte_tokenizer, 96, {"train": 20000, "search": 20000, "heldout": 20000},
                      ("recall", "choice", "copy"), {"train": 30, "search": 8, "heldout": 8})  # fmt: skip
    prepare(request, tmp_path / "again")
    assert hash_file(tmp_path / "again" / "index.json") == hash_file(prepared / "index.json")


def test_only_the_answer_of_a_question_counts(prepared, byte_tokenizer):
    index = read_index(prepared)
    encode = prepare_module.Encoder(byte_tokenizer).tokenizer
    shard = next(shard for shard in index.splits["train"].shards if shard.source == "qa")
    for sample in read_shard(prepared, shard):
        prompt = encode.decode(sample.tokens[sample.mask == 0].tolist())
        answer = sample.tokens[sample.mask == 1]
        assert answer[-1] == index.end_of_text
        number = int(prompt.removeprefix("what is ").split(" ")[0])
        assert encode.decode(answer[:-1].tolist()) == str(number + 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl: line 2 is not JSON"),
        ("keys.jsonl", b'{"txt": "a"}\n', "keys.jsonl: line 1 has neither 'text' nor 'prompt'"),
        ("bad.parquet", b"PAR1 no", "bad.parquet: not a readable parquet file"),
        ("bad.txt", b"\xff\xfe\x00", "bad.txt: cannot be read as UTF-8"),
        ("data.bin", b"x", "data.bin: unknown kind of file"),
        ("empty.txt", b"  \n", "nothing to prepare"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(name, content, message, byte_tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        prepare(Request((str(tmp_path / name),), byte_tokenizer), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_input_tokenizer_and_existing_output(byte_tokenizer, tmp_path):
    with pytest.raises(UserError, match="gone.txt: no such file"):
        prepare(Request((str(tmp_path / "gone.txt"),), byte_tokenizer), tmp_path / "out")
    with pytest.raises(UserError, match="no tokenizer.json"):
        prepare(Request((), tmp_path), tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="give --force"):
        prepare(Request((), byte_tokenizer), tmp_path / "out")


def test_full_disk_leaves_the_old_directory(corpus, byte_tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(Request((str(corpus / "file01.txt"),), byte_tokenizer), out)
    before = hash_file(out / "index.json")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        prepare(Request((str(corpus),), byte_tokenizer), out, force=True)
    assert hash_file(out / "index.json") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parquet_rows_are_documents(byte_tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"row {n}" for n in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    index = prepare(Request((str(tmp_path / "rows.parquet"),), byte_tokenizer), tmp_path / "out")
    assert sum(shard.samples for split in index.splits.values() for shard in split.shards) == 50


def test_command_line(corpus, byte_tokenizer, tmp_path):
    script = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
    out = tmp_path / "out"
    arguments = [str(corpus / "file03.txt"), str(out), "--tokenizer", str(byte_tokenizer), "--json"]
    done = subprocess.run(script + arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["vocab_size"] == 512
    again = subprocess.run(script + arguments, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == f"error: {out} exists; remove it or give --force"


def test_synthetic_samples_differ_between_splits(prepared):
    index = read_index(prepared)
    recall = [
        np.concatenate([sample.tokens for sample in read_shard(prepared, shard)])[:64]
        for split in SPLITS
        for shard in index.splits[split].shards
        if shard.source == "recall"
    ]
    assert not np.array_equal(recall[0], recall[1])
    assert not np.array_equal(recall[1], recall[2])


def test_named_inputs_become_sources_of_their_own(byte_tokenizer, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x = 1\n" * 20)
    rows = [{"text": f"web page {n}"} for n in range(60)] + [
        {"prompt": f"{n} + 1 =", "answer": " 2"} for n in range(60)
    ]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = (f"code={tmp_path / 'code'}", f"web={tmp_path / 'web.jsonl'}", str(tmp_path / "web.jsonl"))
    index = prepare(Request(inputs, byte_tokenizer), tmp_path / "out")
    assert {name: info.packing for name, info in index.sources.items()} == {
        "code": "stream", "web": "stream", "web_qa": "whole", "text": "stream", "qa": "whole"
    }  # fmt: skip
    tokens = {name: sum(split.sources.get(name, 0) for split in index.splits.values()) for name in index.sources}
    assert tokens["code"] == 120 + 1
    assert tokens["web"] == tokens["text"] and tokens["web_qa"] == tokens["qa"]
    with pytest.raises(UserError, match="recall=.*name of a synthetic task"):
        prepare(Request((f"recall={tmp_path / 'code'}",), byte_tokenizer), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_samples_longer_than_an_evaluation_sequence_are_left_out(byte_tokenizer, tmp_path):
    """They are never cut, so that no evaluation could hold them; one token more is fine, it only serves as a label."""
    rows = [{"prompt": "p" * length, "answer": "yes"} for length in range(1, 121)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    index = prepare(Request((str(tmp_path / "qa.jsonl"),), byte_tokenizer, 64), tmp_path / "out", say=said.append)
    kept = [
        len(sample.tokens)
        for split in index.splits.values()
        for shard in split.shards
        for sample in read_shard(tmp_path / "out", shard)
    ]
    assert sorted(kept) == list(range(1 + 4, 65 + 1))  # the prompt, three letters, end of text
    assert said[-1] == "left out: 59 samples of source 'qa' are longer than --seq-length 64 (up to 124 tokens)"
    assert max(split.longest["qa"] for split in index.splits.values()) == 65
    for split in index.splits:
        load_eval_sets(tmp_path / "out", split)
    with pytest.raises(UserError, match="all samples of source 'qa' are longer than --seq-length 3 .*; give 5 or more"):
        prepare(Request((str(tmp_path / "qa.jsonl"),), byte_tokenizer, 3), tmp_path / "none")
    with pytest.raises(UserError, match="--seq-length 0: give a number above 0"):
        prepare(Request((str(tmp_path / "qa.jsonl"),), byte_tokenizer, 0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_length_of_the_command_line_suits_real_data(byte_tokenizer, tmp_path):
    """4,096 tokens as in the paper's recipes; 256 where the tiny recipe's own data are asked for."""
    main = runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))["main"]
    (tmp_path / "qa.jsonl").write_text(
        "".join(json.dumps({"prompt": "p" * 500, "answer": str(n)}) + "\n" for n in range(60))
    )
    common = ["--tokenizer", str(byte_tokenizer), "--synthetic-samples", "2"]
    main([str(tmp_path / "qa.jsonl"), str(tmp_path / "real"), *common])
    assert read_index(tmp_path / "real").seq_length == 4096
    main([str(tmp_path / "own"), *common, "--synthetic", "recall"])
    assert read_index(tmp_path / "own").seq_length == 256
