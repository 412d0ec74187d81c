"""A byte tokenizer and a small prepared directory."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_jet.data.prepare import Request, prepare

VOCAB = 512


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """HF directory with one token per byte (in GPT-2's spelling), end of text 256, vocabulary 512."""
    directory = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"vocab_size": VOCAB, "eos_token_id": 256}))
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty text files, each with letters of its own, and a jsonl file with prompts and answers."""
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (directory / f"file{number:02d}.txt").write_text(f"document {number} " + f"{number:02d}," * (20 + 7 * number))
    rows = [{"prompt": f"what is {n} + 1? ", "answer": str(n + 1)} for n in range(60)]
    (directory / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


@pytest.fixture(scope="session")
def prepared(corpus, byte_tokenizer, tmp_path_factory):
    """The corpus and 30 samples of every synthetic task, 96 tokens long."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    samples = {"train": 30, "search": 8, "heldout": 8}
    request = Request((str(corpus),), byte_tokenizer, 96, {"train": 20000, "search": 20000, "heldout": 20000},
                      ("recall", "choice", "copy"), samples)  # fmt: skip
    prepare(request, out)
    return out
