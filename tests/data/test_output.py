"""Where prepared data go: one writer, nothing left by a signal, no file of a user lost; what split a document gets."""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file
from megatron_jet.configs.lock import exclusive
from megatron_jet.data import copies as copies_module
from megatron_jet.data.copies import Copies
from megatron_jet.data.directory import directory_for
from megatron_jet.data.documents import Document
from megatron_jet.data.index import SPLITS, read_index
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.data.progress import Done
from megatron_jet.data.shards import check_shard, read_shard
from megatron_jet.data.stdlib import split_of, split_of_digest

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_into_one_output(corpus, byte_tokenizer, tmp_path):
    """A double click, or two nodes: the second is refused while the first writes, and the first comes out whole."""
    request = Request((str(corpus),), byte_tokenizer, 96)
    out = tmp_path / "out"
    refused = []

    def second(done: Done) -> None:
        if not refused:
            assert names(tmp_path)[0].startswith(".out.")
            with pytest.raises(
                UserError, match=f"{out}: process {os.getpid()} on .* is working in this directory; wait"
            ):
                prepare(request, out, force=True)
            refused.append(done)

    prepare(request, out, watch=second)
    assert refused and names(tmp_path) == ["out"]
    for split in read_index(out).splits.values():
        for shard in split.shards:
            check_shard(out, shard)


def test_an_output_that_appeared_in_the_meantime_stays(corpus, byte_tokenizer, tmp_path, monkeypatch):
    """Between the first look at OUT and the lock: the folder of the corpus is searched through, the tokenizer read."""
    from megatron_jet.data import prepare as prepare_module

    real = prepare_module.Encoder

    def slow(directory):
        (tmp_path / "out").mkdir()
        return real(directory)

    monkeypatch.setattr(prepare_module, "Encoder", slow)
    with pytest.raises(UserError, match="out exists; remove it or give --force"):
        prepare(Request((str(corpus),), byte_tokenizer, 96), tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []


def test_a_lock_file_that_was_taken_away_holds_nobody(tmp_path):
    """The writer before removed it after this one opened it: what this one locked has no name any more."""
    lock = tmp_path / ".out.lock"
    opened, removed = threading.Event(), threading.Event()
    real = os.open

    def open_slowly(path, *args, **kwargs):
        handle = real(path, *args, **kwargs)
        if str(path) == str(lock) and not opened.is_set():
            opened.set()
            lock.unlink()
            removed.set()
        return handle

    os.open = open_slowly
    try:
        with directory_for(tmp_path / "out") as folder:
            (folder / "x").write_text("x")
            assert removed.is_set() and lock.is_file()
            with pytest.raises(UserError, match="is working in this directory"), exclusive(lock):
                pass
    finally:
        os.open = real
    assert names(tmp_path) == ["out"]


def test_folders_made_for_nothing_go_again(tmp_path):
    with pytest.raises(RuntimeError), directory_for(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert names(tmp_path) == []


BLOCKED = """
import os, runpy, sys
tool = runpy.run_path(sys.argv[1])
from megatron_jet.configs.signals import stop_on_signals
from megatron_jet.data import {module}
real = {module}.{function}
def stop(*args):
    print("begun", flush=True)
    os.read(0, 1)  # until the signal
    return real(*args)
{module}.{function} = stop
sys.argv = sys.argv[1:]
stop_on_signals()
sys.exit(tool["run_tool"](tool["main"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("tool", ["prepare_data", "merge_data"])
def test_a_signal_leaves_nothing(tool, number, prepared, corpus, byte_tokenizer, tmp_path):
    """In the middle of writing; the state is waited for, not a time."""
    if tool == "prepare_data":
        code, arguments = BLOCKED.format(module="prepare", function="read_documents"), [str(corpus), "out"]
        arguments += ["--tokenizer", str(byte_tokenizer)]
    else:
        code, arguments = BLOCKED.format(module="merge", function="_link_or_copy"), [str(prepared), "out"]
    command = [sys.executable, "-c", code, str(ROOT / "tools" / f"{tool}.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "begun\n", process.stderr.read()
        assert names(tmp_path)[0].startswith(".out.")
        process.send_signal(number)
        assert process.wait() == 75
        assert process.stderr.read().splitlines()[-1] == "error: interrupted"
    assert names(tmp_path) == []


@pytest.mark.parametrize("tool", ["prepare_data", "merge_data"])
def test_the_tools_end_on_signals(tool):
    """What the test above does by itself."""
    text = (ROOT / "tools" / f"{tool}.py").read_text()
    assert 'if __name__ == "__main__":\n    stop_on_signals()\n    sys.exit(run_tool(main))' in text


def test_force_loses_no_file_of_the_user(corpus, byte_tokenizer, tmp_path):
    request = Request((str(corpus / "file01.txt"),), byte_tokenizer)
    out = tmp_path / "out"
    prepare(request, out)
    split = next(path for path in out.iterdir() if path.is_dir())
    for stranger in (split / "notes.txt", split / "mine-000000.tar", out / "heldout" / "deep" / "x", split / "link"):
        stranger.parent.mkdir(parents=True, exist_ok=True)
        stranger.symlink_to(corpus) if stranger.name == "link" else stranger.write_text("mine")
        with pytest.raises(UserError, match=f"is not a prepared directory .{stranger.relative_to(out)} is in it"):
            prepare(request, out, force=True)
        assert os.path.lexists(stranger)
        stranger.unlink()
    (out / "index.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match="is not a prepared directory .its index.json is not one"):
        prepare(request, out, force=True)
    assert (out / "index.json").read_text() == '{"mine": 1}'


def test_copies_keep_to_one_split_wherever_they_stand(byte_tokenizer, tmp_path):
    """Also under other names, in other files and kinds of files; and they are counted."""
    rows = [{"text": f"page {number}"} for number in range(200)]
    answers = [{"prompt": f"{number}?", "answer": "yes"} for number in range(100)]
    lines = [json.dumps(row) + "\n" for row in rows + answers]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(reversed(lines[:250])))
    (tmp_path / "page.txt").write_text("page 7")
    said = []
    inputs = tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "page.txt"))
    index = prepare(Request(inputs, byte_tokenizer, 64), tmp_path / "out", say=said.append)
    splits: dict[bytes, list[str]] = {}
    for split, info in index.splits.items():
        for shard in info.shards:
            for sample in read_shard(tmp_path / "out", shard):
                splits.setdefault(sample.tokens.tobytes(), []).append(split)
    assert len(splits) == 300 and sum(map(len, splits.values())) == 551
    assert all(len(set(found)) == 1 for found in splits.values())
    assert {found[0] for found in splits.values()} == set(SPLITS)
    assert said == [f"251 documents are copies of others, such as {tmp_path / 'b.jsonl'}:1; they were kept"]
    assert index.split_by == "content"


def test_files_of_the_standard_library_stay_in_the_splits_of_the_bundled_teacher():
    manifest = json.loads((ROOT / "megatron_jet" / "teachers" / "tiny" / "manifest.json").read_text())
    for split, files in manifest["files"].items():
        assert {split_of(path) for path in files} == {split}
    shares = [split_of_digest(Document("", f"text {number}").digest) for number in range(4000)]
    assert abs(shares.count("heldout") - 200) < 60 and abs(shares.count("search") - 200) < 60


def test_copies_are_counted_in_bounded_memory(monkeypatch):
    """An estimate once there are more contents than are remembered; exact before."""
    digests = [Document("", f"text {number}").digest for number in range(20_000)]
    exact, bounded = Copies(), Copies()
    for count, copies in ((20_000, exact), (1000, bounded)):
        monkeypatch.setattr(copies_module, "LIMIT", count)
        for place, digest in enumerate([*digests, *digests[:10_000], *digests[:10_000]]):
            copies.add(digest, str(place))
            assert len(copies._seen) <= count
    assert str(exact) == "20,000" and exact.first == "20000"
    assert str(bounded).startswith("about ") and 17_000 < bounded.count < 23_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthetic", "recall", "--synthetic-samples", "-1"], "--synthetic-samples -1: give 0 or more"),
        (["--synthetic", "recall,recall"], "synthetic task 'recall' is given twice"),
        (["--synthetic", "recall", "--seq-length", "-5"], "--seq-length -5: give a number above 0"),
        (["--synthetic", "recall", "--seq-length", "999999999999"], "--seq-length 999999999999: give a number up to"),
    ],
)
def test_numbers_that_make_no_sense(byte_tokenizer, tmp_path, arguments, message):
    main = runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))["main"]
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), "--tokenizer", str(byte_tokenizer), *arguments])
    assert names(tmp_path) == []


@pytest.mark.parametrize("out", ["/", "/dev/null/out"])
def test_outputs_that_cannot_be_made(corpus, byte_tokenizer, out):
    before = hash_file(corpus / "file01.txt")
    with pytest.raises(UserError) as caught:
        prepare(Request((str(corpus / "file01.txt"),), byte_tokenizer), Path(out), force=True)
    assert "\n" not in str(caught.value) and out in str(caught.value)
    assert hash_file(corpus / "file01.txt") == before


def test_only_empty_texts_are_nothing_to_prepare(byte_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(UserError, match="nothing to prepare: the inputs hold no text"):
        prepare(Request((str(tmp_path / "a.jsonl"),), byte_tokenizer), tmp_path / "out")
    said = []
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n{"text": "x"}\n')
    prepare(Request((str(tmp_path / "a.jsonl"),), byte_tokenizer), tmp_path / "out", say=said.append)
    assert said == ["left out: 2 documents without text"]


def test_a_file_that_cannot_be_read_is_named_and_not_the_output(corpus, byte_tokenizer, tmp_path, monkeypatch):
    """Tests may run as root, whom no permission stops."""
    real = Path.read_bytes

    def closed(path):
        if path.name == "file02.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(UserError, match="file02.txt: cannot be read .Permission denied"):
        prepare(Request((str(corpus),), byte_tokenizer, 96), tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("fault", ["disk", "document"])
def test_what_fails_among_open_shards_is_one_line(fault, byte_tokenizer, tmp_path):
    """No traceback of the tar stream below it, and nothing is left. A limit on files stands for a full disk."""
    rows = [json.dumps({"text": f"{number} " * 2000}) + "\n" for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(rows) + ("{" if fault == "document" else ""))
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "a.jsonl", "out"]
    run = subprocess.run(
        [*command, "--tokenizer", str(byte_tokenizer)], cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: fault == "disk" and resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    said = {"disk": "out: cannot be written (File too large)", "document": "line 61 is not JSON"}[fault]
    assert run.returncode == 1 and said in run.stderr
    assert "Traceback" not in run.stderr and run.stderr.splitlines()[-1].startswith("error: ")
    assert names(tmp_path) == ["a.jsonl"]
