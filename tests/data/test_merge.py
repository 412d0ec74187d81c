"""Parts of a corpus, prepared one by one, make the directory that one run would have made."""

import json
import os
import runpy
from collections import Counter
from pathlib import Path

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, read_json, write_json
from megatron_jet.configs.training import DataConfig
from megatron_jet.data import merge as merge_module
from megatron_jet.data import shards as shards_module
from megatron_jet.data.index import SPLITS, read_index
from megatron_jet.data.loader import DataLoader
from megatron_jet.data.merge import merge
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.data.shards import check_shard, read_shard

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """Five jsonl files with texts and questions of their own."""
    folder = tmp_path_factory.mktemp("web")
    for file in range(5):
        texts = [{"text": f"page {file} {line} " * 9} for line in range(40)]
        questions = [{"prompt": f"{file}.{line}? ", "answer": "yes" * (1 + file)} for line in range(40)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts + questions))
    return folder


def make(out, inputs, tokenizer, **other):
    prepare(Request(inputs, tokenizer, **{"seq_length": 96, **other}), out)
    return out


@pytest.fixture
def parts(web, byte_tokenizer, tmp_path, monkeypatch):
    """Two parts of the files, and a third with samples of a synthetic task; several shards of a source per part."""
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 2000)
    files = (f"web={web}",)
    samples = dict.fromkeys(SPLITS, 20)
    return [
        make(tmp_path / "part1", files, byte_tokenizer, part=(1, 2)),
        make(tmp_path / "part2", files, byte_tokenizer, part=(2, 2)),
        make(tmp_path / "recall", (), byte_tokenizer, synthetic=("recall",), samples=samples),
    ]


def contents(directory):
    """How often each sample is there, by split and source."""
    index = read_index(directory)
    return Counter(
        (split, shard.source, sample.tokens.tobytes(), None if sample.mask is None else sample.mask.tobytes())
        for split, info in index.splits.items()
        for shard in info.shards
        for sample in read_shard(directory, shard)
    )


def without_shards(directory) -> dict:
    index = read_index(directory).to_dict()
    index["inputs"] = dict(sorted(index["inputs"].items()))
    return index | {"splits": {name: {**split, "shards": None} for name, split in index["splits"].items()}}


def test_parts_make_what_one_run_makes(web, byte_tokenizer, parts, tmp_path):
    whole = make(tmp_path / "whole", (f"web={web}",), byte_tokenizer, synthetic=("recall",),
                 samples=dict.fromkeys(SPLITS, 20))  # fmt: skip
    said = []
    index = merge(parts, tmp_path / "merged", say=said.append)
    assert contents(tmp_path / "merged") == contents(whole)
    assert without_shards(tmp_path / "merged") == without_shards(whole)
    assert list(index.sources) == ["recall", "web", "web_qa"] and index.splits["train"].longest["web_qa"] > 20
    shards = [shard for split in index.splits.values() for shard in split.shards]
    assert len({shard.path for shard in shards}) == len(shards)
    assert said == [f"3 parts, {len(shards)} shards: {len(shards)} hard links, 0 copies"]
    for split, info in index.splits.items():
        sources = [shard.source for shard in info.shards]
        assert sources == sorted(sources) and (split != "train" or len(sources) > len(set(sources)))
        for shard in info.shards:
            check_shard(tmp_path / "merged", shard)
            assert shard.path.startswith(f"{split}/{shard.source}-")


def test_a_merged_directory_trains(parts, tmp_path):
    merge(parts, tmp_path / "merged")
    data = DataConfig(path=str(tmp_path / "merged"), blend={"web": 1.0, "web_qa": 1.0, "recall": 1.0})
    loader = DataLoader(data, "train", seq_length=96, micro_batch_size=4, dp_rank=0, dp_size=1, seed=1)
    seen = set()
    while any(stream.position.epoch == 0 for stream in loader.streams):  # until every shard was opened
        seen |= set(loader.next_batch()["source"].tolist())
        assert loader.row < 4000
    assert seen == {0, 1, 2}


def test_shards_are_copied_and_compared_where_there_are_no_links(parts, tmp_path, monkeypatch):
    merge(parts, tmp_path / "linked")

    def no_link(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    said = []
    merge(parts, tmp_path / "copied", say=said.append)
    assert "0 hard links" in said[0]
    assert hash_file(tmp_path / "copied" / "index.json") == hash_file(tmp_path / "linked" / "index.json")
    assert contents(tmp_path / "copied") == contents(tmp_path / "linked")
    shard = next((parts[0] / "train").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"shard {shard} is damaged; prepare that part again"):
        merge(parts, tmp_path / "again")
    assert not [path for path in tmp_path.iterdir() if "again" in path.name]


CHANGES = {
    "tokenizer_hash": ("0" * 64, "prepared with another tokenizer than"),
    "vocab_size": (1024, r"another vocabulary size than .* \(1024, not 512\)"),
    "end_of_text": (3, r"another end-of-text token than .* \(3, not 256\)"),
    "seq_length": (128, r"another --seq-length than .* \(128, not 96\)"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_parts_must_agree(parts, tmp_path, key):
    value, message = CHANGES[key]
    write_json(parts[1] / "index.json", {**read_json(parts[1] / "index.json"), key: value})
    with pytest.raises(UserError, match=f"part2: .*{message}"):
        merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_must_be_alike(parts, tmp_path):
    index = read_json(parts[1] / "index.json")
    index["sources"]["web"]["packing"] = "whole"
    write_json(parts[1] / "index.json", index)
    with pytest.raises(UserError, match="part2: source 'web' is of packing 'whole' .*part1 of packing 'stream'"):
        merge(parts, tmp_path / "out")


def test_no_document_comes_from_two_parts(web, parts, byte_tokenizer, tmp_path):
    first = str(web / "0.jsonl")
    (tmp_path / "again.jsonl").write_bytes((web / "0.jsonl").read_bytes())
    same = make(tmp_path / "same", (first,), byte_tokenizer)
    copy = make(tmp_path / "copy", (str(tmp_path / "again.jsonl"),), byte_tokenizer)
    samples = dict.fromkeys(SPLITS, 20)
    recall = make(tmp_path / "recall2", (), byte_tokenizer, synthetic=("recall",), samples=samples)
    for others, message in (
        ([same], f"{first}: an input of both .*part1 and .*same; leave it out of one"),
        ([copy], f"again.jsonl, an input of .*copy, has the same content as {first}, an input of .*part1"),
        ([recall], "recall2: its shard .* is also in .*recall; give --stdlib and --synthetic to one part only"),
        ([parts[0]], "part1: given twice"),
    ):
        with pytest.raises(UserError, match=message):
            merge([*parts, *others], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_text_may_be_alike(byte_tokenizer, tmp_path):
    """As licences are in folders of code; one run takes them, too."""
    for part in "ab":
        (tmp_path / part).mkdir()
        (tmp_path / part / "LICENSE.md").write_text("as is")
        (tmp_path / part / "empty.jsonl").write_text("")
        make(tmp_path / f"part-{part}", (str(tmp_path / part),), byte_tokenizer)
    index = merge([tmp_path / "part-a", tmp_path / "part-b"], tmp_path / "out")
    assert len(index.inputs) == 4 and contents(tmp_path / "out").total() == 2


@pytest.mark.parametrize("damage", ["missing", "cut", "cut to a record"])
def test_a_part_with_a_damaged_shard_is_named(parts, tmp_path, damage):
    shard = sorted((parts[1] / "train").iterdir())[0]
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:10240])
    problem = "missing" if damage == "missing" else "cut short"
    with pytest.raises(UserError, match=f"shard {shard} is {problem}; prepare {parts[1]} again"):
        merge(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_and_parts_that_are_none(parts, tmp_path):
    with pytest.raises(UserError, match="no index.json there"):
        merge([*parts, tmp_path], tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; remove it or give --force"):
        merge(parts, tmp_path / "out")
    merge(parts, tmp_path / "out", force=True)
    before = {path: hash_file(path) for path in tmp_path.rglob("*.tar")}
    with pytest.raises(UserError, match="the output would replace the input .*part1"):
        merge(parts, parts[0], force=True)
    with pytest.raises(UserError, match="the output would replace the input .*part1"):
        merge(parts, tmp_path, force=True)
    assert {path: hash_file(path) for path in tmp_path.rglob("*.tar")} == before


def test_command_line(parts, tmp_path, capsys, monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools" / "merge_data.py"))
    assert tool["main"]([*map(str, parts), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("train: ")
    monkeypatch.setattr("sys.argv", ["merge_data.py", *map(str, parts), str(tmp_path / "out")])
    assert tool["run_tool"](tool["main"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} exists; remove it or give --force\n"


def test_an_interrupted_merge_leaves_nothing(parts, tmp_path, monkeypatch):
    real, calls = merge_module._link_or_copy, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(merge_module, "_link_or_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(parts, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part1", "part2", "recall"]
