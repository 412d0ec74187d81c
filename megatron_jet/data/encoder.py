"""Text to tokens with all cores of the machine. What comes out does not depend on how many there are."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Encoding, Tokenizer

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, read_json
from megatron_jet.data.documents import Document
from megatron_jet.data.shards import Sample

# Encoded together: enough to occupy many cores, while the tokenizer's 100 bytes per byte stay below half a GiB.
BATCH_DOCUMENTS = 1024
BATCH_BYTES = 4 << 20


class HasDocument(Protocol):
    """A document, and whatever else a caller wants to get back with its tokens."""

    document: Document


class Encoder:
    """An HF tokenizer without transformers: text to token ids.

    The tokenizers library takes all cores; RAYON_NUM_THREADS bounds them and TOKENIZERS_PARALLELISM=false takes one.

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
        # A tokenizer.json can ask for either. Documents are neither cut, nor padded to the longest of their batch.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = read_json(directory / "config.json")
        end = config.get("eos_token_id")
        self.end_of_text = end[0] if isinstance(end, list) else end
        if self.end_of_text is None:
            raise UserError(f"{directory / 'config.json'}: no eos_token_id, which ends documents")
        self.vocab_size = int(config.get("vocab_size") or self.tokenizer.get_vocab_size())
        self.hash = hash_file(path)

    def encode[Item: HasDocument](self, items: Iterable[Item]) -> Iterator[tuple[Item, Sample]]:
        """Every item with the tokens of its document, in order.

        While a thread encodes one batch, the caller writes the one before and reads the one after.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="encoder") as thread:
            ahead = None
            for batch in batches(items):
                coming = batch, thread.submit(self._samples, [item.document for item in batch])
                if ahead is not None:
                    yield from zip(ahead[0], ahead[1].result())
                ahead = coming
            if ahead is not None:
                yield from zip(ahead[0], ahead[1].result())

    def _samples(self, documents: list[Document]) -> list[Sample]:
        texts = [text for document in documents for text in (document.text, document.answer) if text is not None]
        encodings = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [self._sample(document, encodings) for document in documents]

    def _sample(self, document: Document, encodings: Iterator[Encoding]) -> Sample:
        """Tokens with the end-of-text token after them; of a prompt with an answer, only the answer counts."""
        prompt = next(encodings).ids
        if document.answer is None:
            return Sample(np.array([*prompt, self.end_of_text], np.uint32))
        answer = [*next(encodings).ids, self.end_of_text]
        mask = np.array([0] * len(prompt) + [1] * len(answer), np.uint8)
        return Sample(np.array(prompt + answer, np.uint32), mask)


def batches[Item: HasDocument](items: Iterable[Item]) -> Iterator[list[Item]]:
    """Consecutive items, as many as make up BATCH_DOCUMENTS or BATCH_BYTES; a large document comes by itself."""
    batch: list[Item] = []
    size = 0
    for item in items:
        own = item.document.bytes
        if batch and (len(batch) == BATCH_DOCUMENTS or size + own > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += own
    if batch:
        yield batch
