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

    Args:
        say: gets a line for each folder with files of kinds that are not read.

    Raises:
        UserError: a missing path, an unknown kind of file, a file given twice for one source.
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
        every = [path for path in given.rglob("*") if path.is_file()]
        inside = sorted(path for path in every if path.name.endswith(SUFFIXES))
        if not inside:
            raise UserError(f"{given}: no {', '.join(SUFFIXES)} file in this folder")
        others = Counter(path.suffix or "none" for path in every if not path.name.endswith(SUFFIXES))
        if others:
            kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in others.most_common(KINDS_NAMED))
            say(f"{given}: {others.total():,} files of other kinds are not read ({kinds})")
        return inside
    if not given.is_file():
        raise UserError(f"{given}: no such file or folder")
    if not given.name.endswith(SUFFIXES):
        raise UserError(f"{given}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    return [given]
