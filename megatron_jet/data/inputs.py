"""Input files: which there are, what sources they make, and how they are opened."""

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_jet.configs.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".html")
# Plain .json is left alone: in folders of code it is one value, not a line per document.
LINE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")
KINDS_NAMED = 3  # of files that are not read
MAC_FOLDER = "__MACOSX"  # in archives made on a Mac, with a file of attributes for every file
CODECS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class InputFile:
    """A file, and the source that its documents belong to (None: "text", and "qa" for those with answers)."""

    path: Path
    source: str | None = None

    def source_of(self, answered: bool) -> str:
        """Texts and answers are packed and scored in different ways, so they are sources of their own."""
        if not answered:
            return self.source or "text"
        return f"{self.source}_qa" if self.source else "qa"


def find_inputs(given: list[str], say: Callable[[str], None] = lambda line: None) -> list[InputFile]:
    """Files among PATH and NAME=PATH arguments, folders searched through, sorted.

    Hidden files of a folder are what editors, notebooks, git and downloads leave there, mostly copies: they are read
    when they are given by name only.

    Args:
        say: gets a line for each folder with files that are not read.

    Raises:
        UserError: a missing path, a folder that cannot be read, an unknown kind of file, a file given twice for one
            source.
    """
    found = []
    for text in given:
        named = None if Path(text).exists() else re.fullmatch(r"([a-z][a-z0-9_-]*)=(.+)", text)
        source, path = named.groups() if named else (None, text)
        found += [InputFile(file, source) for file in _files(Path(path), say)]
    seen = set()
    for file in found:
        key = (os.path.abspath(file.path), file.source)
        if key in seen:
            raise UserError(f"{file.path}: given twice for source '{file.source_of(False)}'; give it once")
        seen.add(key)
    return found


def part_of(files: list[InputFile], part: tuple[int, int]) -> list[InputFile]:
    """The files of part i of n (from 1): every n-th one, so that parts get some of every folder.

    Raises:
        UserError: no such part, or fewer files than parts.
    """
    number, parts = part
    if not 1 <= number <= parts:
        raise UserError(f"--part {number}/{parts}: parts go from 1/{parts} to {parts}/{parts}")
    if parts > len(files):
        raise UserError(
            f"--part {number}/{parts}: there are {len(files)} input files only; make fewer parts, or split files"
        )
    return files[number - 1 :: parts]


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed lines of a file, and the file itself, whose position says how much of it has been read."""
    with open(path, "rb") as file:
        codec = CODECS.get(path.suffix)
        if codec is None:
            yield file, file
            return
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), codec) as stream:
            yield io.BufferedReader(stream, 1 << 20), file


def _files(given: Path, say: Callable[[str], None]) -> list[Path]:
    if given.is_dir():
        return _files_in(given, say)
    if not given.is_file():
        raise UserError(f"{given}: no such file or folder")
    if not given.name.endswith(SUFFIXES):
        raise UserError(f"{given}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    return [_named_in_utf8(given)]


def _files_in(given: Path, say: Callable[[str], None]) -> list[Path]:
    """Files of a folder, with a line about those that are left out."""
    inside, others, hidden, links = [], Counter(), 0, 0
    for folder, folders, names in os.walk(given, onerror=_unreadable):
        inner = Path(folder).relative_to(given).parts
        links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        for name in names:
            path = Path(folder, name)
            if any(part.startswith(".") or part == MAC_FOLDER for part in (*inner, name)):
                hidden += 1
            elif not path.is_file():  # pipes, sockets, links that lead nowhere
                others["none"] += 1
            elif name.endswith(SUFFIXES):
                inside.append(_named_in_utf8(path))
            else:
                others[path.suffix or "none"] += 1
    left_out = []
    if others:
        kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in others.most_common(KINDS_NAMED))
        left_out.append(f"{others.total():,} files of other kinds are not read ({kinds})")
    if hidden:
        left_out.append(f"{hidden:,} hidden files are not read (names with a dot first, {MAC_FOLDER})")
    if links:
        left_out.append(f"{links:,} links to folders are not followed")
    if not inside:
        why = f" ({'; '.join(left_out)}); give them by name" if hidden or links else ""
        raise UserError(f"{given}: no {', '.join(SUFFIXES)} file in this folder{why}")
    if left_out:
        say(f"{given}: {'; '.join(left_out)}")
    return sorted(inside)


def _unreadable(error: OSError) -> None:
    """A folder that cannot be searched through is no empty one."""
    raise UserError(f"{error.filename}: this folder cannot be read ({error.strerror or error})") from None


def _named_in_utf8(path: Path) -> Path:
    """Names are kept in index.json, as text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r}: this file's name is not UTF-8; rename it") from None
    return path
