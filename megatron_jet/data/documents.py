"""Documents from text, jsonl and parquet files, one at a time whatever the size of the file."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.data.inputs import LINE_SUFFIXES, open_lines

# The tokenizer needs about 100 bytes per byte of a text, so this is what bounds its memory.
MAX_DOCUMENT_BYTES = 32 << 20
# A line of JSON may spell each byte of a text with six, and hold other things. One without end fills the memory.
MAX_LINE_BYTES = 8 * MAX_DOCUMENT_BYTES
PARQUET_ROWS = 512  # read at a time
READ_BYTES = 1 << 20  # of what is left out
HEAD_BYTES = 64  # of a file, to see what it is
BYTE_ORDER_MARK = "\ufeff"
UTF16 = "cannot be read as UTF-8: it is UTF-16 or UTF-32; convert it, for example with iconv -f UTF-16 -t UTF-8"


@dataclass(frozen=True)
class Document:
    """Text, or a prompt with the answer that counts.

    Attributes:
        name: says where it came from.
        text: the text, or the prompt.
        answer: follows the prompt; then only its tokens count as targets.
        read: bytes of its file that were read to get here.
    """

    name: str
    text: str
    answer: str | None = None
    read: int = 0

    @property
    def bytes(self) -> int:
        """Of its text in UTF-8. Raises UnicodeEncodeError for half a surrogate pair, which JSON can spell."""
        return len(self.text.encode()) + len((self.answer or "").encode())

    @property
    def digest(self) -> str:
        """MD5 (hex) of what it says, wherever that stands."""
        digest = hashlib.md5(self.text.encode(), usedforsecurity=False)
        if self.answer is not None:
            digest.update(b"\0answer\0" + self.answer.encode())
        return digest.hexdigest()


def refuse(problem: str) -> None:
    """What to do about a document that cannot be used: raise UserError."""
    raise UserError(f"{problem}; mend it, or leave such documents out with --skip-bad")


BadDocument = Callable[[str], None]  # is told which one, and what is wrong; may raise


def read_documents(
    path: Path, bad_document: BadDocument = refuse, empty_document: Callable[[], None] = lambda: None
) -> Iterator[Document]:
    """Documents of one file: a text file is one, a jsonl line one, a parquet row one.

    Args:
        bad_document: called for each document that cannot be used; when it returns, that one is left out.
        empty_document: called for each text of white space or nothing, which is left out.

    Raises:
        UserError: names a file that cannot be read, and what of it is wrong.
    """
    if path.name.endswith(LINE_SUFFIXES):
        found = _jsonl(path, bad_document)
    elif path.suffix == ".parquet":
        found = _parquet(path, bad_document)
    else:
        found = _text(path, bad_document)
    try:
        for document in found:
            if document.text.startswith(BYTE_ORDER_MARK):
                document = replace(document, text=document.text.removeprefix(BYTE_ORDER_MARK))
            if document.answer is None and not document.text.strip():
                empty_document()
                continue
            problem = _problem(document)
            if problem:
                bad_document(f"{document.name}: {problem}")
            else:
                yield document
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}){_way_out(path, error)}") from None


def _problem(document: Document) -> str | None:
    """Why it cannot be used."""
    if document.answer is not None and not (document.text.strip() and document.answer.strip()):
        return "an empty prompt" if document.answer.strip() else "an empty answer, of which nothing could be learned"
    try:
        size = document.bytes
    except UnicodeEncodeError as error:
        return f"not text: half a surrogate pair at character {error.start + 1}"
    if size > MAX_DOCUMENT_BYTES:
        return _too_large(size)
    return None


def _way_out(path: Path, error: OSError) -> str:
    """What to do about zstd frames that want more than the decoder gives them (`zstd --ultra --long=31`)."""
    if path.suffix == ".zst" and "too much memory" in str(error):
        return "; it was compressed with a long window: write it again after zstd -d --long=31"
    return ""


def _too_large(size: int) -> str:
    return f"one document of {size / 2**20:,.1f} MiB, more than {MAX_DOCUMENT_BYTES >> 20}"


def _text(path: Path, bad_document: BadDocument) -> Iterator[Document]:
    size = path.stat().st_size
    if size > MAX_DOCUMENT_BYTES:
        bad_document(f"{path}: {_too_large(size)}; put its documents on the lines of a .jsonl file")
        return
    content = path.read_bytes()
    if is_utf16(content[:HEAD_BYTES]):
        bad_document(f"{path}: {UTF16}")
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_document(f"{path}: cannot be read as UTF-8 text ({error})")
        return
    yield Document(str(path), text.replace("\r\n", "\n").replace("\r", "\n"), read=size)


def _jsonl(path: Path, bad_document: BadDocument) -> Iterator[Document]:
    with open_lines(path) as (lines, file):
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b""), 1):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                bad_document(f"{path}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB")
                while line and not line.endswith(b"\n"):
                    line = lines.readline(READ_BYTES)
                continue
            if number == 1 and is_utf16(line[:HEAD_BYTES]):
                raise UserError(f"{path}: {UTF16}")
            if not line.strip():
                continue
            try:
                # Every file of those that were put together may have begun with a mark.
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                bad_document(f"{path}: line {number} is not UTF-8 ({error})")
                continue
            except (ValueError, RecursionError) as error:
                bad_document(f"{path}: line {number} is not JSON ({error})")
                continue
            texts = _texts(row)
            if texts is None:
                bad_document(f"{path}: line {number} has neither 'text' nor 'prompt' and 'answer' as strings")
                continue
            yield Document(f"{path}:{number}", *texts, read=file.tell())


def is_utf16(head: bytes) -> bool:
    """Whether a file begins as UTF-16 or UTF-32: with their mark, or with Latin letters in two bytes each."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return True
    head = head[: len(head) // 2 * 2]
    return len(head) >= 2 and any(head) and (not any(head[::2]) or not any(head[1::2]))


def _texts(row: Any) -> tuple[str] | tuple[str, str] | None:
    """Text, or prompt and answer, of a jsonl line."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return (row["text"],)
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
        return row["prompt"], row["answer"]
    return None


def _parquet(path: Path, bad_document: BadDocument) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_schema(path, file.schema_arrow)
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=["text"]):
                end = number + len(batch)
                read = size * end // file.metadata.num_rows
                for value in _strings(batch.column(0)):
                    number += 1
                    if isinstance(value, UnicodeDecodeError):
                        bad_document(f"{path}: row {number} is not UTF-8 ({value})")
                    else:
                        yield Document(f"{path}:{number}", value or "", read=read)
    # The last three: names of columns that are no text, and whatever else a damaged footer says.
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable parquet file ({problem})") from None


def _check_schema(path: Path, schema: Any) -> None:
    """Raise UserError unless there is one column `text` of strings."""
    import pyarrow

    if schema.names.count("text") != 1:
        what = "no column" if "text" not in schema.names else "several columns"
        raise UserError(f"{path}: {what} 'text'; it has {', '.join(schema.names)}")
    kind = schema.field("text").type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view", "null"):
        raise UserError(f"{path}: column 'text' holds {kind}, not strings")


def _strings(column: Any) -> list[str | None | UnicodeDecodeError]:
    """Values of a column, which parquet does not promise to be UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_string(value) for value in column]


def _string(value: Any) -> str | None | UnicodeDecodeError:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error
