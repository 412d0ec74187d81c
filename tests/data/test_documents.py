"""What corpora look like: compressed lines, rows that are no text, files that are cut short."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.data import documents as documents_module
from megatron_jet.data.documents import read_documents
from megatron_jet.data.inputs import find_inputs, part_of

LINES = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(3000)).encode()


def compressed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return pyarrow.compress(data, codec="zstd", asbytes=True) if name.endswith(".zst") else data


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst"])
def test_lines_may_be_compressed_in_several_pieces(tmp_path, name):
    """Many tools append gzip members or zstd frames to one file."""
    path = tmp_path / "nested" / name
    path.parent.mkdir()
    path.write_bytes(compressed(name, LINES[:20_000]) + compressed(name, LINES[20_000:]))
    (file,) = find_inputs([str(tmp_path)])
    documents = list(read_documents(file.path))
    assert [document.text for document in documents] == [f"document {number}" for number in range(3000)]
    assert documents[-1].name == f"{path}:3000"
    places = [document.read for document in documents]
    assert places == sorted(places) and places[-1] == path.stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_compressed_file_is_named(tmp_path, name, damage):
    data = compressed(name, LINES)
    (tmp_path / name).write_bytes(data[:-50] if damage == "cut" else LINES)
    with pytest.raises(UserError, match=rf"{name}: cannot be read \("):
        list(read_documents(tmp_path / name))


def test_an_empty_file_holds_no_document(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt"):
        (tmp_path / name).write_bytes(b"")
        assert list(read_documents(tmp_path / name)) == []
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == []


BAD_LINES = [b'{"text": "a"', b'{"text": null}', b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": "\xff"}']
PROBLEMS = ["line 1 is not JSON", "line 2 has neither", "3: not text: half a", "line 4 is not", "line 5 is not"]


def test_bad_lines_are_named_and_can_be_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    said = []
    path.write_bytes(b"\n".join([*BAD_LINES, b'{"text": "good"}']))
    assert [(document.name, document.text) for document in read_documents(path, said.append)] == [(f"{path}:6", "good")]
    assert len(said) == len(PROBLEMS)
    for line, problem in zip(said, PROBLEMS):
        assert problem in line and str(path) in line
    with pytest.raises(UserError, match="line 1 is not JSON .*; mend it, or leave such documents out with --skip-bad"):
        list(read_documents(path))


def test_parquet_of_other_types_and_bytes(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="a.parquet: column 'text' holds int64, not strings"):
        list(read_documents(path))
    raw = pyarrow.array([b"good", b"\xff\xfe", b"", b"fine", None], "binary")
    text = pyarrow.Array.from_buffers(pyarrow.string(), 5, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "id": range(5)}), path)
    said = []
    names = {document.name: document.text for document in read_documents(path, said.append)}
    assert names == {f"{path}:1": "good", f"{path}:4": "fine"}
    assert len(said) == 1 and "row 2 is not UTF-8" in said[0]
    column = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert [document.text for document in read_documents(path)] == ["x", "y", "x"]


def test_parquet_is_read_a_few_rows_at_a_time_and_damage_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"{number:05d}" * 100 for number in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=1000, compression="zstd")
    documents = read_documents(path)
    first = next(documents)
    assert 0 < first.read <= path.stat().st_size * 512 / 2000
    assert [document.text for document in documents] == rows[1:]
    data = bytearray(path.read_bytes())
    data[100:3000] = bytes(2900)
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.parquet: not a readable parquet file"):
        list(read_documents(path))


def test_a_document_too_large_for_the_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "a.txt").write_text("word " * 300_000)
    with pytest.raises(UserError, match="a.txt: one document of 1.4 MiB, more than 1; put .* lines of a .jsonl file"):
        list(read_documents(tmp_path / "a.txt"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "é" * 600_000}) + '\n{"text": "good"}\n')
    said = []
    assert [document.text for document in read_documents(tmp_path / "a.jsonl", said.append)] == ["good"]
    assert said == [f"{tmp_path / 'a.jsonl'}:1: one document of 1.1 MiB, more than 1"]


def test_a_file_given_twice_for_one_source_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    path = str(tmp_path / "a.jsonl")
    assert len(find_inputs([path, f"web={path}"])) == 2
    with pytest.raises(UserError, match="a.jsonl: given twice for source 'web'"):
        find_inputs([f"web={tmp_path}", f"web={tmp_path}/../{tmp_path.name}/a.jsonl"])


def test_files_of_other_kinds_in_a_folder_are_counted(tmp_path):
    for name in ("a.jsonl", "b.json", "c.json", "e.json", "d", "f"):
        (tmp_path / name).write_bytes(b"")
    said = []
    assert [file.path.name for file in find_inputs([str(tmp_path)], said.append)] == ["a.jsonl"]
    assert said == [f"{tmp_path}: 5 files of other kinds are not read (.json 3, none 2)"]


def test_parts_hold_every_file_once(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text("x")
    files = find_inputs([str(tmp_path)])
    parts = [part_of(files, (number, 3)) for number in (1, 2, 3)]
    assert sorted((file for part in parts for file in part), key=lambda file: file.path) == files
    assert [len(part) for part in parts] == [3, 2, 2]
    for part, message in (
        ((0, 3), "parts go"),
        ((4, 3), "parts go"),
        ((1, 8), "are 7 input files"),
    ):
        with pytest.raises(UserError, match=re.escape(f"--part {part[0]}/{part[1]}: ") + f".*{message}"):
            part_of(files, part)
