"""A Hugging Face tokenizer without transformers, and what its config.json says of it; both are checked here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import describe_json, hash_file, read_json_object
from megatron_jet.data.index import LARGEST_VOCAB

PROBES = ("a", "0", ".", " a")  # texts that some token stands for in any vocabulary


@dataclass(frozen=True)
class TextTokenizer:
    """What turns text into token ids of a model.

    Attributes:
        tokenizer: of the tokenizers library; neither cuts nor pads.
        vocab_size: of the model; all ids are below it.
        begin_of_text: tokens that the tokenizer's post-processor puts before every text (Llama 3 has one).
        end_of_text: token that ends a document.
        hash: of tokenizer.json.
    """

    tokenizer: Tokenizer
    vocab_size: int
    begin_of_text: list[int]
    end_of_text: int
    hash: str


def read_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        UserError: no tokenizer.json or config.json, a damaged one, no end-of-text token, or token ids that the model's
            vocabulary does not have.
    """
    path, config_path = directory / "tokenizer.json", directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no tokenizer.json; --tokenizer takes a Hugging Face directory")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{path}: not a readable tokenizer ({error})") from None
    # A tokenizer.json can ask for either. Documents are neither cut, nor padded to the longest of their batch.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise UserError(f"{path}: a tokenizer without tokens")
    config = read_json_object(config_path)
    vocab_size = config.get("vocab_size")
    if vocab_size is None:
        vocab_size = max(vocabulary.values()) + 1
    if not _is_whole(vocab_size) or not 0 < vocab_size <= LARGEST_VOCAB:
        raise UserError(f"{config_path}: vocab_size is {_shown(vocab_size)}; it should be the model's number of tokens")
    largest = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[largest] >= vocab_size:
        raise UserError(
            f"{path}: token {largest!r} has id {vocabulary[largest]}, the vocabulary of {config_path} ends at "
            f"{vocab_size - 1}; use the tokenizer and the config.json of one model"
        )
    ends = _special(config, "eos_token_id", vocab_size, config_path)
    if not ends:
        raise UserError(f"{config_path}: no eos_token_id, which ends documents")
    _special(config, "bos_token_id", vocab_size, config_path)
    begin = _begin_of_text(tokenizer, ends[0])
    return TextTokenizer(tokenizer, vocab_size, begin, ends[0], hash_file(path))


def _special(config: dict[str, Any], key: str, vocab_size: int, where: Path) -> list[int]:
    """The ids of a special token, which config.json has as one or as a list; none if it has none."""
    given = config.get(key)
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for token in ids:
        if not _is_whole(token):
            raise UserError(f"{where}: {key} is {_shown(given)}; it should be a token id")
        if not 0 <= token < vocab_size:
            raise UserError(f"{where}: {key} {token} is not in a vocabulary of {vocab_size}; name a token that is")
    return ids


def _begin_of_text(tokenizer: Tokenizer, end_of_text: int) -> list[int]:
    """What the post-processor puts before a text; what it puts after one is not asked for, documents end anyway."""
    for probe in PROBES:
        plain = tokenizer.encode(probe, add_special_tokens=False).ids
        if plain:
            full = tokenizer.encode(probe).ids
            starts = (i for i in range(len(full)) if full[i : i + len(plain)] == plain)
            return full[: next(starts, 0)]
    before = tokenizer.encode("").ids
    return before[: before.index(end_of_text)] if end_of_text in before else before


def begin(ids: list[int], begin_of_text: list[int]) -> list[int]:
    """Tokens of a text with those before it; a text that spells them out itself has them once."""
    return ids if ids[: len(begin_of_text)] == begin_of_text else [*begin_of_text, *ids]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A JSON value in a message: short ones as they are, others by their kind."""
    return repr(value) if isinstance(value, int | float | str) and len(repr(value)) < 40 else describe_json(value)
