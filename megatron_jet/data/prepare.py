"""Tokenise documents and synthetic tasks into a data directory of webdataset shards.

No document and no task seed is in two splits: documents go by a hash of what they say, so that copies keep to one split
wherever they stand; every split and task has a seed of its own. Files of the standard library go by their path, as they
did when the bundled teacher was trained. The same input gives the same bytes, with any number of cores.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, hash_json, write_json
from megatron_jet.data.copies import Copies
from megatron_jet.data.directory import check_kind, check_output, directory_for
from megatron_jet.data.documents import Document, read_documents, refuse
from megatron_jet.data.encoder import Encoder
from megatron_jet.data.index import LONGEST_SEQUENCE, SPLITS, DataIndex, SourceInfo
from megatron_jet.data.inputs import InputFile, find_inputs, part_of
from megatron_jet.data.output import Output
from megatron_jet.data.progress import Done, Watch
from megatron_jet.data.stdlib import read_stdlib, split_of_digest
from megatron_jet.data.synthetic_samples import SYNTHETIC, synthetic_samples

Say = Callable[[str], None]
BUNDLED_SAMPLES = {"train": 4000, "search": 256, "heldout": 256}
BUNDLED_TEXT_BYTES = {"train": 3_000_000, "search": 300_000, "heldout": 300_000}
TEXT = SourceInfo(packing="stream", metric="loss")
ANSWERS = SourceInfo(packing="whole", metric="exact")
BAD_NAMED = 3  # of those that are left out


@dataclass(frozen=True)
class Request:
    """What to prepare.

    Attributes:
        inputs: files and folders; NAME=PATH makes them a source of that name.
        tokenizer: HF directory with tokenizer.json and config.json.
        seq_length: tokens of synthetic samples and of evaluation sequences. Longer samples with answers are left out.
        stdlib_bytes: bytes of the Python standard library per split; empty for none.
        synthetic: names of synthetic tasks.
        samples: synthetic samples per task and split.
        part: (i, n) takes part i of n of the input files, from 1.
        skip_bad: leave documents out that cannot be used; else the first ends the work.
    """

    inputs: tuple[str, ...]
    tokenizer: Path
    seq_length: int = 256
    stdlib_bytes: dict[str, int] | None = None
    synthetic: tuple[str, ...] = ()
    samples: dict[str, int] | None = None
    part: tuple[int, int] | None = None
    skip_bad: bool = False


def prepare_bundled(out: Path, tokenizer: Path, say: Say = lambda line: None) -> DataIndex:
    """The tiny recipe's data: Python's standard library and the synthetic tasks. Replaces `out`, whatever is in it."""
    request = Request((), tokenizer, 256, BUNDLED_TEXT_BYTES, tuple(SYNTHETIC), BUNDLED_SAMPLES)
    return _write(request, out, [], say, lambda done: None)


def prepare(
    request: Request,
    out: Path,
    *,
    force: bool = False,
    say: Say = lambda line: None,
    watch: Watch = lambda done: None,
) -> DataIndex:
    """Write the data directory `out`, all of it or nothing.

    Args:
        force: replace an earlier output.
        say: gets lines of news.
        watch: told after every sample how far the work is.

    Raises:
        UserError: bad input (named), an existing `out` that is not to be replaced, nothing to write.
    """
    check_kind(out, force)  # before folders of a million files are searched
    _check(request)
    files = find_inputs(list(request.inputs), say)
    inputs = [file.path for file in files]
    check_output(out, inputs, force)
    for file in files:
        if file.source in SYNTHETIC:
            raise UserError(f"{file.source}={file.path}: that is the name of a synthetic task; choose another name")
    if request.part is not None:
        files = part_of(files, request.part)
    # Once more when nobody else can write it: another process may have made it until then.
    return _write(request, out, files, say, watch, lambda: check_output(out, inputs, force))


def _check(request: Request) -> None:
    """Raise UserError for numbers and names that make no sense."""
    if not 1 <= request.seq_length <= LONGEST_SEQUENCE:
        limit = "above 0" if request.seq_length < 1 else f"up to {LONGEST_SEQUENCE:,}"
        raise UserError(f"--seq-length {request.seq_length}: give a number {limit}")
    for count in (request.samples or {}).values():
        if count < 0:
            raise UserError(f"--synthetic-samples {count}: give 0 or more")
    for task in request.synthetic:
        if task not in SYNTHETIC:
            raise UserError(f"unknown synthetic task '{task}'; known: {', '.join(SYNTHETIC)}")
        if request.synthetic.count(task) > 1:
            raise UserError(f"synthetic task '{task}' is given twice; give it once")


def _write(
    request: Request,
    out: Path,
    files: list[InputFile],
    say: Say,
    watch: Watch,
    check: Callable[[], None] = lambda: None,
) -> DataIndex:
    """Make the directory.

    Args:
        check: called when no other process can write `out` any more.
    """
    encoder = Encoder(request.tokenizer)
    with directory_for(out) as folder:
        check()
        preparation = _Preparation(request, files, encoder, folder, say, watch)
        try:
            index = preparation.run()
        except BaseException:
            preparation.output.abandon()
            raise
        write_json(folder / "index.json", index.to_dict())
    return index


@dataclass(frozen=True)
class _Placed:
    """A document, and where it goes.

    Attributes:
        read: bytes of all input files that were read to get here.
    """

    document: Document
    split: str
    source: str
    info: SourceInfo
    read: int


class _Preparation:
    """One run of the above: reads, encodes and writes in a fixed order."""

    def __init__(
        self, request: Request, files: list[InputFile], encoder: Encoder, folder: Path, say: Say, watch: Watch
    ):
        self.request, self.files, self.encoder, self.say, self.watch = request, files, encoder, say, watch
        self.output = Output(folder, encoder.vocab_size, request.seq_length)
        self.sizes = {file: _size(file.path) for file in files}
        self.total = sum(self.sizes.values())
        self.hashes: dict[str, str] = {}
        self.bad = self.empty = 0
        self.copies = Copies()

    def run(self) -> DataIndex:
        corpus = dict(_stdlib(self.request.stdlib_bytes or {}, self.say))
        for placed, sample in self.encoder.encode(self._documents(corpus)):
            self.output.add(placed.split, placed.source, placed.info, sample, placed.document.name)
            self.watch(Done(placed.read, self.total, self.output.tokens))
        self._add_synthetic(corpus)
        lines = self.output.close()
        if self.bad:
            lines.append(f"left out: {self.bad:,} documents that cannot be used")
        if self.empty:
            lines.append(f"left out: {self.empty:,} documents without text")
        if self.copies.first is not None:
            lines.append(f"{self.copies} documents are copies of others, such as {self.copies.first}; they were kept")
        for line in lines:
            self.say(line)
        self.watch(Done(self.total, self.total, self.output.tokens))
        return DataIndex(
            vocab_size=self.encoder.vocab_size,
            end_of_text=self.encoder.end_of_text,
            begin_of_text=self.encoder.begin_of_text,
            seq_length=self.request.seq_length,
            tokenizer_hash=self.encoder.hash,
            split_by="content",
            inputs=self.hashes,
            sources=dict(sorted(self.output.sources.items())),
            splits=self.output.splits(),
        )

    def _documents(self, corpus: dict[str, list[Document]]) -> Iterator[_Placed]:
        """All documents in the order of the shards: the files', then the standard library's."""
        before = 0
        bad_document = self._leave_out if self.request.skip_bad else refuse
        for file in self.files:
            for document in read_documents(file.path, bad_document, self._leave_out_empty):
                answered = document.answer is not None
                source, info = file.source_of(answered), ANSWERS if answered else TEXT
                digest = document.digest
                self.copies.add(digest, document.name)
                yield _Placed(document, split_of_digest(digest), source, info, before + document.read)
            # Now, while the file is likely to be in memory still.
            self.hashes[str(file.path)] = _hash(file.path)
            before += self.sizes[file]
        for split, documents in corpus.items():
            for document in documents:
                yield _Placed(document, split, "text", TEXT, before)

    def _leave_out(self, problem: str) -> None:
        self.bad += 1
        if self.bad <= BAD_NAMED:
            self.say(f"left out: {problem}")

    def _leave_out_empty(self) -> None:
        self.empty += 1

    def _add_synthetic(self, corpus: dict[str, list[Document]]) -> None:
        request = self.request
        for task in request.synthetic:
            for split in SPLITS:
                count = (request.samples or {}).get(split, 0)
                self.say(f"synthetic {task} {split}: {count} samples")
                texts = [np.frombuffer(document.text.encode(), np.uint8) for document in corpus.get(split, [])]
                for number, sample in enumerate(synthetic_samples(task, split, count, request.seq_length, texts)):
                    self.output.add(split, task, SYNTHETIC[task].info, sample, f"{task}:{split}:{number}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _stdlib(limits: dict[str, int], say: Say) -> Iterable[tuple[str, list[Document]]]:
    """Documents of the standard library per split, in an order that mixes modules, up to a number of bytes."""
    for split, limit in limits.items():
        files = sorted(read_stdlib(split), key=lambda file: hash_json(file.path))
        chosen, size = [], 0
        for file in files:
            if size >= limit:
                break
            chosen.append(Document(f"stdlib:{file.path}", file.content.decode("utf-8", errors="replace")))
            size += len(file.content)
        say(f"standard library {split}: {len(chosen)} of {len(files)} files, {size:,} bytes")
        yield split, chosen
