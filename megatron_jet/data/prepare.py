"""Tokenise documents and synthetic tasks into a data directory of webdataset shards.

No document and no task seed is in two splits: documents go by a hash of their name, every split and task has a seed of
its own. The same input gives the same bytes.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, hash_json, read_json, write_json
from megatron_jet.data.documents import Document, InputFile, find_inputs, read_documents
from megatron_jet.data.index import SPLITS, DataIndex, SourceInfo, SplitInfo
from megatron_jet.data.shards import Sample, ShardWriter
from megatron_jet.data.stdlib import read_stdlib, split_of
from megatron_jet.data.synthetic_samples import SYNTHETIC, synthetic_samples

Say = Callable[[str], None]
BUNDLED_SAMPLES = {"train": 4000, "search": 256, "heldout": 256}
BUNDLED_TEXT_BYTES = {"train": 3_000_000, "search": 300_000, "heldout": 300_000}


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
    """

    inputs: tuple[str, ...]
    tokenizer: Path
    seq_length: int = 256
    stdlib_bytes: dict[str, int] | None = None
    synthetic: tuple[str, ...] = ()
    samples: dict[str, int] | None = None


def prepare_bundled(out: Path, tokenizer: Path, say: Say = lambda line: None) -> DataIndex:
    """The tiny recipe's data: Python's standard library and the synthetic tasks. Replaces an existing `out`."""
    request = Request((), tokenizer, 256, BUNDLED_TEXT_BYTES, tuple(SYNTHETIC), BUNDLED_SAMPLES)
    return prepare(request, out, force=True, say=say)


def prepare(request: Request, out: Path, *, force: bool = False, say: Say = lambda line: None) -> DataIndex:
    """Write the data directory `out`, all of it or nothing.

    Raises:
        UserError: bad input (named), an existing `out` without `force`, nothing to write.
    """
    if out.exists() and not force:
        raise UserError(f"{out} exists; remove it or give --force")
    if request.seq_length < 1:
        raise UserError(f"--seq-length {request.seq_length}: give a number above 0")
    for task in request.synthetic:
        if task not in SYNTHETIC:
            raise UserError(f"unknown synthetic task '{task}'; known: {', '.join(SYNTHETIC)}")
    files = find_inputs(list(request.inputs))
    for file in files:
        if file.source in SYNTHETIC:
            raise UserError(f"{file.source}={file.path}: that is the name of a synthetic task; choose another name")
    encoder = Encoder(request.tokenizer)
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        index = _write(request, files, encoder, temporary, say)
        write_json(temporary / "index.json", index.to_dict())
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return index


class Encoder:
    """An HF tokenizer without transformers: text to token ids.

    Raises:
        UserError: no tokenizer.json or config.json, or a tokenizer without an end-of-text token.
    """

    def __init__(self, directory: Path):
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{directory}: no tokenizer.json; --tokenizer takes a Hugging Face directory")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{path}: not a readable tokenizer ({error})") from None
        config = read_json(directory / "config.json")
        end = config.get("eos_token_id")
        self.end_of_text = end[0] if isinstance(end, list) else end
        if self.end_of_text is None:
            raise UserError(f"{directory / 'config.json'}: no eos_token_id, which ends documents")
        self.vocab_size = int(config.get("vocab_size") or self.tokenizer.get_vocab_size())
        self.hash = hash_file(path)

    def document(self, document: Document) -> Sample:
        """Tokens with the end-of-text token after them; of a prompt with an answer, only the answer counts."""
        prompt = self.tokenizer.encode(document.text, add_special_tokens=False).ids
        if document.answer is None:
            return Sample(np.array([*prompt, self.end_of_text]))
        answer = [*self.tokenizer.encode(document.answer, add_special_tokens=False).ids, self.end_of_text]
        mask = np.array([0] * len(prompt) + [1] * len(answer), np.uint8)
        return Sample(np.array(prompt + answer), mask)


@dataclass
class _Output:
    """Shards in the making, by split and source.

    Attributes:
        longest: tokens of the longest sample, of sources whose samples are never cut.
        left_out: lengths in tokens, by source, of samples with answers that are longer than an evaluation sequence.
    """

    directory: Path
    vocab_size: int
    seq_length: int
    sources: dict[str, SourceInfo] = field(default_factory=dict)
    writers: dict[tuple[str, str], ShardWriter] = field(default_factory=dict)
    longest: dict[tuple[str, str], int] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def add(self, split: str, source: str, info: SourceInfo, sample: Sample, name: str) -> None:
        key, length = (split, source), len(sample.tokens)
        if info.packing == "whole":
            # One more than a sequence has: the last token is a label only.
            if length > self.seq_length + 1:
                self.left_out.setdefault(source, []).append(length)
                return
            self.longest[key] = max(self.longest.get(key, 0), length)
        self.sources.setdefault(source, info)
        if key not in self.writers:
            self.writers[key] = ShardWriter(self.directory, split, source, self.vocab_size)
        self.writers[key].add(sample, name)

    def close(self, say: Say) -> None:
        """Finish the shards, and say what was left out.

        Raises:
            UserError: a source lost all of its samples, or there was nothing to begin with.
        """
        for writer in self.writers.values():
            writer.close()
        for source, lengths in sorted(self.left_out.items()):
            what = f"of source '{source}' are longer than --seq-length {self.seq_length} (up to {max(lengths)} tokens)"
            if source not in self.sources:
                raise UserError(f"all samples {what}; give {min(lengths)} or more")
            say(f"left out: {len(lengths):,} samples {what}")
        if not self.writers:
            raise UserError("nothing to prepare: the inputs hold no text")


def _write(request: Request, files: list[InputFile], encoder: Encoder, out: Path, say: Say) -> DataIndex:
    output = _Output(out, encoder.vocab_size, request.seq_length)
    text = SourceInfo(packing="stream", metric="loss")
    answers = SourceInfo(packing="whole", metric="exact")
    for number, file in enumerate(files, 1):
        say(f"[{number}/{len(files)}] {file.path}")
        for document in read_documents(file.path):
            info = text if document.answer is None else answers
            sample = encoder.document(document)
            output.add(split_of(document.name), file.source_of(document), info, sample, document.name)
    corpus = dict(_stdlib(request.stdlib_bytes or {}, say))
    for split, documents in corpus.items():
        for document in documents:
            output.add(split, "text", text, encoder.document(document), document.name)
    for task in request.synthetic:
        for split in SPLITS:
            count = (request.samples or {}).get(split, 0)
            say(f"synthetic {task} {split}: {count} samples")
            texts = [np.frombuffer(document.text.encode(), np.uint8) for document in corpus.get(split, [])]
            for number, sample in enumerate(synthetic_samples(task, split, count, request.seq_length, texts)):
                output.add(split, task, SYNTHETIC[task].info, sample, f"{task}:{split}:{number}")
    output.close(say)
    return _index(request, files, encoder, output)


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


def _index(request: Request, files: list[InputFile], encoder: Encoder, output: _Output) -> DataIndex:
    splits = {}
    for split in SPLITS:
        writers = [writer for (name, _), writer in sorted(output.writers.items()) if name == split]
        shards = [shard for writer in writers for shard in writer.shards]
        tokens: dict[str, int] = {}
        for shard in shards:
            tokens[shard.source] = tokens.get(shard.source, 0) + shard.tokens
        longest = {source: length for (name, source), length in sorted(output.longest.items()) if name == split}
        if shards:
            splits[split] = SplitInfo(sources=tokens, shards=shards, longest=longest)
    return DataIndex(
        vocab_size=encoder.vocab_size,
        end_of_text=encoder.end_of_text,
        seq_length=request.seq_length,
        tokenizer_hash=encoder.hash,
        inputs={str(file.path): hash_file(file.path) for file in files},
        sources=dict(sorted(output.sources.items())),
        splits=splits,
    )
