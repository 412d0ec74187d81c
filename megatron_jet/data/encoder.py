"""Text to tokens with all cores of the machine. What comes out does not depend on how many there are."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Encoding

from megatron_jet.data.documents import Document
from megatron_jet.data.shard_format import Sample
from megatron_jet.data.tokenizer import begin, read_tokenizer

# Encoded together: enough to occupy many cores, while the tokenizer's 100 bytes per byte stay below half a GiB.
BATCH_DOCUMENTS = 1024
BATCH_BYTES = 4 << 20


class HasDocument(Protocol):
    """A document, and whatever else a caller wants to get back with its tokens."""

    document: Document


class Encoder:
    """Documents to samples.

    The tokenizers library takes all cores; RAYON_NUM_THREADS bounds them and TOKENIZERS_PARALLELISM=false takes one.

    Raises:
        UserError: as `read_tokenizer`.
    """

    def __init__(self, directory: Path):
        found = read_tokenizer(directory)
        self.tokenizer, self.vocab_size, self.hash = found.tokenizer, found.vocab_size, found.hash
        self.begin_of_text, self.end_of_text = found.begin_of_text, found.end_of_text

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
        """Tokens between those that begin and end a text; of a prompt with an answer, only the answer counts."""
        prompt = begin(next(encodings).ids, self.begin_of_text)
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
