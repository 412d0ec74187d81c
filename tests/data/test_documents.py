"""What corpora look like: compressed lines, rows that are no text, files that are cut short."""

import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.data import documents as documents_module
from megatron_jet.data.documents import Document, read_documents
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


def texts_of(path, **options) -> list[str]:
    return [document.text for document in read_documents(path, **options)]


def test_hidden_files_of_a_folder_are_left_out_and_counted(tmp_path):
    """Editors, notebooks, git, the Hub's downloader and Macs leave copies and attributes there."""
    for name in (".ipynb_checkpoints/a.jsonl", ".git/b.txt", ".cache/x/c.parquet", "._a.jsonl", "__MACOSX/sub/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    with pytest.raises(UserError, match=r"file in this folder \(5 hidden files are not read .*\); give them by name"):
        find_inputs([str(tmp_path)])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.json").write_bytes(b"{}")
    said = []
    assert [file.path for file in find_inputs([str(tmp_path)], said.append)] == [tmp_path / "sub" / "a.jsonl"]
    assert said == [
        f"{tmp_path}: 1 files of other kinds are not read (.json 1); 5 hidden files are not read (names with a dot "
        "first, __MACOSX)"
    ]
    by_name = [str(tmp_path / name) for name in (".git", ".ipynb_checkpoints/a.jsonl", "__MACOSX")]
    assert [file.path.name for file in find_inputs(by_name)] == ["b.txt", "a.jsonl", "d.txt"]


def test_a_folder_that_cannot_be_searched_is_no_empty_one(tmp_path, monkeypatch):
    """Tests may run as root, whom no permission stops."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if os.fspath(path) == str(tmp_path / "closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="closed: this folder cannot be read .Permission denied"):
        find_inputs([str(tmp_path)])


def test_names_that_are_no_text_and_links_to_folders(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    (tmp_path / "far").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "gone.txt").symlink_to(tmp_path / "gone.txt")
    said = []
    assert [file.path.name for file in find_inputs([str(tmp_path / "in")], said.append)] == ["a.txt"]
    others = "1 files of other kinds are not read (none 1); 1 links to folders are not followed"
    assert said == [f"{tmp_path / 'in'}: {others}"]
    with open(os.fsencode(tmp_path / "in") + b"/\xff.txt", "w"):
        pass
    with pytest.raises(UserError, match="this file's name is not UTF-8; rename it"):
        find_inputs([str(tmp_path / "in")])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text_and_other_encodings_are_refused(tmp_path, name):
    lines = '{"text": "first"}\n{"text": "second"}\n'
    path = tmp_path / name
    content = "first" if name == "a.txt" else lines
    path.write_bytes(compressed(name, content.encode("utf-8-sig")))
    assert texts_of(path)[0] == "first"
    if name != "a.txt":
        path.write_bytes(compressed(name, 2 * lines.encode("utf-8-sig")))  # two files put together
        assert texts_of(path) == ["first", "second"] * 2
        path.write_bytes(compressed(name, b'{"text": "\\ufefffirst"}'))
        assert texts_of(path) == ["first"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        path.write_bytes(compressed(name, content.encode(encoding)))
        with pytest.raises(UserError, match=f"{name}: cannot be read as UTF-8: it is UTF-16 or UTF-32; convert it"):
            texts_of(path)


def test_texts_of_nothing_are_left_out_and_answers_of_nothing_are_bad(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": text} for text in ("", " \n\t", "\ufeff", "good")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty = []
    assert texts_of(path, empty_document=lambda: empty.append(1)) == ["good"]
    assert len(empty) == 3
    for row, problem in (
        ({"prompt": "x", "answer": ""}, "an empty answer"),
        ({"prompt": "x", "answer": " \n"}, "an empty answer"),
        ({"prompt": "", "answer": "x"}, "an empty prompt"),
    ):
        path.write_text(json.dumps(row) + '\n{"prompt": "x", "answer": "y"}\n')
        said = []
        assert texts_of(path, bad_document=said.append) == ["x"]
        assert len(said) == 1 and said[0].startswith(f"{path}:1: {problem}")
        with pytest.raises(UserError, match=f"a.jsonl:1: {problem}.*--skip-bad"):
            texts_of(path)


TEXT = pyarrow.string()


@pytest.mark.parametrize("kind", [pyarrow.list_(TEXT), pyarrow.large_list(TEXT), pyarrow.list_(TEXT, 1)], ids=str)
def test_a_parquet_column_of_lists_is_no_text(tmp_path, kind):
    column = pyarrow.array([["a"], ["b"]], kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: column 'text' holds .*list.*, not strings"):
        texts_of(tmp_path / "a.parquet")


def test_two_parquet_columns_of_one_name(tmp_path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: several columns 'text'; it has text, text"):
        texts_of(tmp_path / "a.parquet")


def test_a_long_zstd_window_names_the_way_out(tmp_path, monkeypatch):
    """What pyarrow says of a frame made with --long=31; making one takes 2 GiB."""

    def refused(*args, **kwargs):
        raise OSError("ZSTD decompress failed: Frame requires too much memory for decoding")

    monkeypatch.setattr(pyarrow, "CompressedInputStream", refused)
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    with pytest.raises(UserError, match="a.jsonl.zst: cannot be read .*; .* write it again after zstd -d --long=31"):
        texts_of(tmp_path / "a.jsonl.zst")


def test_documents_that_say_the_same_have_one_digest():
    same = {Document(name, "text", read=7).digest for name in ("a:1", "b:2")}
    others = {Document("a", *texts).digest for texts in (("text ",), ("text", "x"), ("textx", ""))}
    assert len(same) == 1 and len(same | others) == 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_without_end_does_not_fill_the_memory(name, tmp_path, monkeypatch):
    """A few KiB of gzip can be gigabytes of one line; what comes after it is read."""
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(documents_module, "READ_BYTES", 100)
    write = gzip.open if name.endswith(".gz") else open
    fits = json.dumps({"text": "x" * 980}).encode()
    for end in (b"\n", b""):
        with write(tmp_path / name, "wb") as file:
            file.write(fits + b"\n" + b"y" * 5000 + b"\n" + b'{"text": "z"}\n' + b"w" * 1000 + end)
        problems = []
        found = [document.text for document in read_documents(tmp_path / name, problems.append)]
        assert [len(text) for text in found] == [980, 1]
        assert [problem.rpartition(": ")[2] for problem in problems] == [
            "line 2 is longer than 0 MiB", "line 4 is longer than 0 MiB",
        ]  # fmt: skip
