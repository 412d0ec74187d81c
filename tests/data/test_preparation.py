"""Long runs of prepare_data.py: progress, bad documents, parts, and what --force may replace."""

import json
import os
import runpy
from pathlib import Path

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file
from megatron_jet.data.index import read_index
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.data.progress import Done, PreparationProgress, size

ROOT = Path(__file__).resolve().parents[2]


def test_progress_counts_bytes_of_all_files_and_tokens(corpus, byte_tokenizer, tmp_path):
    seen = []
    index = prepare(Request((str(corpus),), byte_tokenizer, 96), tmp_path / "out", watch=seen.append)
    total = sum(path.stat().st_size for path in corpus.iterdir())
    assert {done.total for done in seen} == {total}
    assert [done.read for done in seen] == sorted(done.read for done in seen)
    assert seen[0].read == (corpus / "file00.txt").stat().st_size
    assert seen[-1].read == total
    assert seen[-1].tokens == sum(shard.tokens for split in index.splits.values() for shard in split.shards)


def test_a_line_now_and_then_off_a_terminal(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with PreparationProgress() as progress:
        progress.update(Done(1, 10, 1))
        assert capsys.readouterr().err == ""
        clock[0] += 50
        progress.update(Done(2 << 30, 10 << 30, 1_000_000))
        assert capsys.readouterr().err == "2.0 GiB of 10.0 GiB, 20,000 tokens/s, 0:03:20 left\n"
        clock[0] += 10
        progress.update(Done(3 << 30, 10 << 30, 1_200_000))
        assert capsys.readouterr().err == ""
    assert progress.summary() == "1,200,000 tokens of 10.0 GiB in 0:01:00, 20,000 tokens/s"
    progress.update(Done(0, 0, 60))
    assert progress.summary() == "60 tokens in 0:01:00, 1 tokens/s"
    assert [size(count) for count in (0, 1023, 1024, 5 << 40, 5000 << 40)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "5.0 TiB", "5,000.0 TiB"
    ]  # fmt: skip


def test_bad_documents_end_the_work_or_are_counted(byte_tokenizer, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["{", '{"text": 1}', '{"text": "\\udc00"}', "[]", json.dumps({"text": "good"})]))
    main = runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))["main"]
    arguments = [str(path), str(tmp_path / "out"), "--tokenizer", str(byte_tokenizer)]
    with pytest.raises(UserError, match="line 1 is not JSON .*--skip-bad"):
        main(arguments)
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]
    assert main([*arguments, "--skip-bad"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 + 1 + 1
    assert lines[0].startswith(f"left out: {path}: line 1 is not JSON")
    assert lines[3] == "left out: 4 documents that cannot be used"
    assert lines[4].startswith("5 tokens of ")
    (split,) = read_index(tmp_path / "out").splits.values()
    assert [shard.samples for shard in split.shards] == [1]


def test_parts_are_asked_for_on_the_command_line(corpus, byte_tokenizer, tmp_path):
    main = runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))["main"]
    common = ["--tokenizer", str(byte_tokenizer), "--part"]
    for number in (1, 2):
        main([str(corpus), str(tmp_path / str(number)), *common, f"{number}/2"])
    one, two = (read_index(tmp_path / str(number)).inputs for number in (1, 2))
    assert not set(one) & set(two) and len(one) + len(two) == 41
    for wrong in (["x/2"], ["2"], ["1/2", "--stdlib"]):
        with pytest.raises(SystemExit):
            main([str(corpus), str(tmp_path / "none"), *common, *wrong])


def test_force_replaces_earlier_outputs_only(corpus, byte_tokenizer, tmp_path):
    request = Request((str(corpus / "file01.txt"),), byte_tokenizer)
    mine = tmp_path / "mine"
    mine.mkdir()
    prepare(request, mine, force=True)  # an empty folder
    prepare(request, mine, force=True)
    inside = next(path for path in mine.iterdir() if path.is_dir()) / "corpus.txt"  # of whatever split file01 is in
    inside.write_text("mine")
    with pytest.raises(UserError, match="the output would replace the input .*corpus.txt"):
        prepare(Request((str(inside),), byte_tokenizer), mine, force=True)
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine is not a prepared directory .notes.txt is in it.; --force"):
        prepare(request, mine, force=True)
    before = {path: hash_file(path) for path in corpus.iterdir()}
    with pytest.raises(UserError, match="is not a prepared directory .it has no index.json"):
        prepare(request, corpus, force=True)
    with pytest.raises(UserError, match="is not a prepared directory .it is a file"):
        prepare(request, mine / "notes.txt", force=True)
    assert {path: hash_file(path) for path in corpus.iterdir()} == before


def test_the_folder_behind_a_link_is_replaced(corpus, byte_tokenizer, tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "out")
    prepare(Request((str(corpus / "file01.txt"),), byte_tokenizer), tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
