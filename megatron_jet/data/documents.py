"""Documents from text, jsonl and parquet files."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".html")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")


@dataclass(frozen=True)
class Document:
    """Text, or a prompt with the answer that counts.

    Attributes:
        name: says where it came from; decides its split.
        text: the text, or the prompt.
        answer: follows the prompt; then only its tokens count as targets.
    """

    name: str
    text: str
    answer: str | None = None


@dataclass(frozen=True)
class InputFile:
    """A file, and the source that its documents belong to (None: "text", and "qa" for those with answers)."""

    path: Path
    source: str | None = None

    def source_of(self, document: Document) -> str:
        """Texts and answers are packed and scored in different ways, so they are sources of their own."""
        if document.answer is None:
            return self.source or "text"
        return f"{self.source}_qa" if self.source else "qa"


def find_inputs(given: list[str]) -> list[InputFile]:
    """Files among PATH and NAME=PATH arguments, folders searched through, sorted.

    Raises:
        UserError: a missing path, an unknown kind of file.
    """
    found = []
    for text in given:
        named = None if Path(text).exists() else re.fullmatch(r"([a-z][a-z0-9_-]*)=(.+)", text)
        source, path = named.groups() if named else (None, text)
        found += [InputFile(file, source) for file in _files(Path(path))]
    return found


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        inside = sorted(path for path in given.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not inside:
            raise UserError(f"{given}: no {', '.join(SUFFIXES)} file in this folder")
        return inside
    if not given.is_file():
        raise UserError(f"{given}: no such file or folder")
    if given.suffix not in SUFFIXES:
        raise UserError(f"{given}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    return [given]


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of one file: a text file is one, a jsonl line one, a parquet row one.

    Raises:
        UserError: names the file, and the line or column that is wrong.
    """
    if path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        if text.strip():
            yield Document(str(path), text)


def _jsonl(path: Path) -> Iterator[Document]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error})") from None
            name = f"{path}:{number}"
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                yield Document(name, row["text"])
            elif isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
                yield Document(name, row["prompt"], row["answer"])
            else:
                raise UserError(f"{path}: line {number} has neither 'text' nor 'prompt' and 'answer' as strings")


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from None
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path}: no column 'text'; it has {', '.join(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(columns=["text"]):
        for value in batch.column(0).to_pylist():
            number += 1
            if value:
                yield Document(f"{path}:{number}", value)
