"""Prepared directories that somebody else made: nothing in them runs, nothing outside them is read or written."""

import io
import json
import os
import pickle
import runpy
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, read_json, write_json
from megatron_jet.data.index import read_index
from megatron_jet.data.merge import merge
from megatron_jet.data.prepare import Request, prepare
from megatron_jet.data.shards import check_shard_ends, read_shard
from megatron_jet.tasks.evalset import load_eval_sets

ROOT = Path(__file__).resolve().parents[2]


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def small(tmp_path_factory, byte_tokenizer):
    """Forty texts and forty questions."""
    folder = tmp_path_factory.mktemp("small")
    rows = [{"text": f"page {n} of the book"} for n in range(40)]
    rows += [{"prompt": f"{n} + 1 =", "answer": f" {n + 1}"} for n in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(Request((str(folder / "a.jsonl"),), byte_tokenizer, 64), folder / "data")
    return folder / "data"


@pytest.fixture
def data(small, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(small, tmp_path / "data"))


def change_index(data: Path, change) -> None:
    index = read_json(data / "index.json")
    change(index)
    write_json(data / "index.json", index)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def plain(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def spoil(data: Path, members: list, samples: int = 1, tokens: int = 3) -> str:
    """Replace the first shard of text in `train` by other members; the index knows its checksum. Returns its path."""
    path = data / "train" / "text-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))

    def change(index):
        shard = next(shard for shard in index["splits"]["train"]["shards"] if shard["path"] == "train/text-000000.tar")
        shard |= {"sha256": hash_file(path), "samples": samples, "tokens": tokens}

    change_index(data, change)
    return str(path)


TOKENS = plain("000000000.tokens.npy", npy(np.array([1, 2, 3], np.uint16)))
HUGE = npy(np.array([1, 2, 3], np.uint16)).replace(b"'shape': (3,), }      ", b"'shape': (300000,), } ")


def trapped(trap: Path) -> dict[str, list]:
    """Shards that nobody here writes, each with the word that names what is wrong."""
    code = pickle.dumps(Trap(trap))
    objects = npy(np.array([Trap(trap)], object), allow_pickle=True)
    return {
        "000000000.pkl": [TOKENS, plain("000000000.pkl", code)],
        "000000000.pyd": [plain("000000000.pyd", code), TOKENS],
        "000000000.pth": [TOKENS, plain("000000000.pth", code)],
        "000000000.tokens.npy.gz": [TOKENS, plain("000000000.tokens.npy.gz", code)],
        "a.tokens.npy": [plain("a.tokens.npy", TOKENS[1])],
        "/etc/passwd": [plain("/etc/passwd", b"x"), TOKENS],
        "is a link": [special("000000000.tokens.npy", tarfile.SYMTYPE, "/etc/passwd")],
        "is a link or a device": [special("000000000.tokens.npy", tarfile.CHRTYPE)],
        "not a row of unsigned whole numbers": [plain("000000000.tokens.npy", objects)],
        "not a row of unsigned": [plain("000000000.tokens.npy", npy(np.array([[1, 2, 3]], np.uint16)))],
        "tokens of sample 0: not a row": [plain("000000000.tokens.npy", npy(np.array([1.0, 2.0, 3.0])))],
        "300,000 numbers in 6 bytes": [plain("000000000.tokens.npy", HUGE)],
        "has tokens.npy twice": [TOKENS, TOKENS],
        "sample 1 follows": [plain("000000001.tokens.npy", TOKENS[1])],
        "has no tokens.npy": [plain("000000000.mask.npy", npy(np.array([1], np.uint8)))],
        "mask of sample 0 is not": [TOKENS, plain("000000000.mask.npy", npy(np.array([1, 1], np.uint8)))],
        "mask of sample 0 is not a 0 or 1": [TOKENS, plain("000000000.mask.npy", npy(np.array([1, 7, 1], np.uint8)))],
        "0 of type": [plain("000000000.tokens.npy", npy(np.array([], np.uint16)))],
    }


def test_only_what_is_written_here_is_decoded(data, tmp_path):
    """The pickles would have made a folder; every other shard is one line that names it and what it holds."""
    for words, members in trapped(tmp_path / "ran").items():
        path = spoil(data, members)
        with pytest.raises(UserError) as caught:
            load_eval_sets(data, "train")
        assert f"shard {path} cannot be read" in str(caught.value) and words in str(caught.value), words
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "ran").exists()


def test_the_trap_works(tmp_path):
    """Else the test above would prove nothing."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "ran")))  # noqa: S301  our own
    assert (tmp_path / "ran").is_dir()


def test_a_compressed_or_long_named_shard_is_refused(data):
    path = Path(spoil(data, [TOKENS]))
    assert load_eval_sets(data, "train")
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(TOKENS[0], io.BytesIO(TOKENS[1]))
    index = read_index(data)
    shard = next(shard for shard in index.splits["train"].shards if shard.source == "text")
    with pytest.raises(UserError, match="text-000000.tar cannot be read"):
        read_shard(data, shard)
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(path, "w", format=form) as tar:
            tar.addfile(plain("x" * 120 + ".tokens.npy", TOKENS[1])[0], io.BytesIO(TOKENS[1]))
        with pytest.raises(UserError, match="text-000000.tar cannot be read"):
            read_shard(data, shard)


def test_token_ids_beyond_the_vocabulary_of_the_index(data):
    path = spoil(data, [plain("000000000.tokens.npy", npy(np.array([1, 512, 3], np.uint16)))])
    with pytest.raises(UserError, match=f"shard {path}: token 512 is not in a vocabulary of 512; prepare"):
        load_eval_sets(data, "train")


def test_a_shard_holds_as_much_as_the_index_says(data):
    spoil(data, [TOKENS], samples=1, tokens=4)
    with pytest.raises(UserError, match="has 1 samples of 3 tokens, index.json says 1 of 4"):
        load_eval_sets(data, "train")


def test_a_path_is_never_a_command(data, tmp_path, monkeypatch):
    """webdataset runs what follows `pipe:`, and fetches `http:`."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch PWNED;true ", "http:x", "file:y"):
        shutil.copytree(data, name)
        assert load_eval_sets(name, "heldout")
        merge([Path(name)], Path(f"{name} out"))
        assert load_eval_sets(f"{name} out", "heldout")
    assert not (tmp_path / "PWNED").exists()


def at(*keys, value):
    """A change of the index: `keys` lead to what becomes `value`."""

    def change(index):
        for key in keys[:-1]:
            index = index[key]
        index[keys[-1]] = value

    return change


FIRST = ("splits", "train", "shards", 0)


def renamed(old: str, new: str, *where: str):
    def change(index):
        for key in where:
            index = index[key]
        index[new] = index.pop(old)

    return change


CHANGES = {
    "path leads out": (at(*FIRST, "path", value="../x.tar"), "splits.train.shards.0.path"),
    "absolute path": (at(*FIRST, "path", value="/etc/passwd"), "splits.train.shards.0.path"),
    "path of a command": (at(*FIRST, "path", value="pipe:id"), "splits.train.shards.0.path"),
    "path of another split": (at(*FIRST, "path", value="heldout/qa-000000.tar"), "'heldout/qa-000000.tar' is no file"),
    "shard source": (at(*FIRST, "source", value="../../../evil"), "splits.train.shards.0.source"),
    "unknown shard source": (at(*FIRST, "source", value="evil"), "is of source 'evil', of which split 'train' has no"),
    "source": (renamed("qa", "../evil", "sources"), "sources.../evil"),
    "source of a split": (renamed("qa", "evil", "splits", "train", "sources"), "source 'evil', which is not among"),
    "split": (renamed("train", "../../evil2", "splits"), "splits.../../evil2"),
    "checksum": (at("inputs", value={"a": "../x"}), "inputs.a"),
    "version": (at("schema_version", value=99), "schema_version: .* reads 1; prepare the data again"),
    "negative tokens": (at(*FIRST, "tokens", value=-5), "splits.train.shards.0.tokens"),
    "negative tokens of a split": (at("splits", "train", "sources", "qa", value=-5), "splits.train.sources.qa"),
    "no samples": (at(*FIRST, "samples", value=0), "splits.train.shards.0.samples"),
    "length": (at("seq_length", value=10**12), "seq_length"),
    "vocabulary": (at("vocab_size", value=-1), "vocab_size"),
    "end of text": (at("end_of_text", value=512), "end_of_text: token 512 is not in a vocabulary of 512"),
    "choices": (at("sources", "qa", "choices", value=[1, 600]), "choices of source 'qa': token 600 is not in"),
    "no choices": (at("sources", "qa", "metric", value="choice"), "metric 'choice' needs choices"),
    "null": (at("splits", value=None), "splits"),
    "list": (at("sources", value=[]), "sources"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_an_index_is_checked_wherever_it_is_read(data, tmp_path, case):
    change, words = CHANGES[case]
    change_index(data, change)
    before = {path: hash_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    for use in (lambda: load_eval_sets(data, "train"), lambda: merge([data], tmp_path / "a" / "b" / "out")):
        with pytest.raises(UserError, match=f"index.json: .*{words}") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert {path: hash_file(path) for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["[]", "null", "7", '"x"', "{}", "{", '{"sources": 1e999}', "[" * 100_000])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match="index.json: ") as caught:
        read_index(tmp_path)
    assert "\n" not in str(caught.value)


def test_links_do_not_lead_out_of_the_directory(data, tmp_path):
    shard = next(shard for shard in read_index(data).splits["train"].shards if shard.source == "text")
    path = data / shard.path
    path.rename(data / "train" / "elsewhere.tar")
    path.symlink_to("elsewhere.tar")  # as storage that shares equal files does
    assert read_shard(data, shard)
    (data / "train" / "elsewhere.tar").rename(tmp_path / "outside.tar")
    path.unlink()
    path.symlink_to(tmp_path / "outside.tar")
    for use in (
        lambda: read_shard(data, shard),
        lambda: check_shard_ends(data, shard),
        lambda: load_eval_sets(data, "train"),
        lambda: merge([data], tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=f"shard {path} is a link that leads out of {data}"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_directory_of_an_earlier_version_is_read(data):
    """Without what the index has gained since."""
    change_index(data, lambda index: [index.pop(key) for key in ("begin_of_text", "split_by")])
    index = read_index(data)
    assert index.split_by == "path" and index.begin_of_text == []
    assert {evalset.name for evalset in load_eval_sets(data, "train")} == {"qa", "text"}


def test_the_tool_says_it_in_one_line(data, tmp_path, capsys, monkeypatch):
    change_index(data, at(*FIRST, "path", value="../x.tar"))
    tool = runpy.run_path(str(ROOT / "tools" / "merge_data.py"))
    monkeypatch.setattr("sys.argv", ["merge_data.py", str(data), str(tmp_path / "out")])
    assert tool["run_tool"](tool["main"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data / 'index.json'}: splits.train.shards.0.path") and error.count("\n") == 1
