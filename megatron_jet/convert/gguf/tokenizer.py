"""A GGUF file's tokenizer as Hugging Face files: tokenizer.json and tokenizer_config.json.

The file names how text is split before byte-pair encoding (`tokenizer.ggml.pre`, llama.cpp's names). The rules here are
those of the tokenizers that llama.cpp's names stand for; transformers' own GGUF reading knows GPT-2's rule only, and
so splits numbers and blanks of SmolLM2 and Qwen2 otherwise than these models were trained with.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from megatron_jet.configs.errors import UserError

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{_LETTERS}|\p{{N}}|{_REST}"
LLAMA3 = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def write_tokenizer(fields: dict[str, Any], directory: Path, where: Path) -> None:
    """Write both files.

    Args:
        fields: of the GGUF file.
        directory: an existing directory.
        where: the GGUF file, for messages.

    Raises:
        UserError: a kind of tokenizer that is not read, or fields that do not make one.
    """
    kind, pre = fields.get(f"{PREFIX}model"), fields.get(f"{PREFIX}pre", "default")
    if kind != "gpt2":
        raise UserError(
            f"{where}: {PREFIX}model is {kind!r}; only byte-level BPE ('gpt2') is read. Take the model's Hugging Face "
            "directory instead"
        )
    try:
        tokenizer = _tokenizer(fields, pre, where)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{where}: its tokenizer cannot be read ({error})") from None
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(_settings(fields), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _tokenizer(fields: dict[str, Any], pre: str, where: Path) -> Tokenizer:
    tokens, kinds = fields[f"{PREFIX}tokens"], fields[f"{PREFIX}token_type"]
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{where}: {PREFIX}tokens and {PREFIX}token_type do not fit together, or a token is twice there"
        )
    # Rows that only fill up the embedding have no text.
    vocabulary = {token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in fields[f"{PREFIX}merges"]]
    llama3 = pre in LLAMA3_NAMES
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=llama3))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, where)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in enumerate(tokens):
        if kinds[number] in (CONTROL, USER_DEFINED):
            # One by one: the ids are those of the vocabulary, in whatever order the two kinds come.
            added = AddedToken(token, special=kinds[number] == CONTROL, normalized=False)
            (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
    if fields.get(f"{PREFIX}add_bos_token", llama3):
        number = fields[f"{PREFIX}bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[number]} $A", special_tokens=[(tokens[number], number)]
        )
    return tokenizer


def _pre_tokenizer(pre: str, where: Path) -> pre_tokenizers.PreTokenizer:
    """What splits a text before byte-pair encoding."""
    if pre in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":  # every digit by itself, then GPT-2's rule
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    rules = {"qwen2": QWEN2} | dict.fromkeys(LLAMA3_NAMES, LLAMA3)
    if pre not in rules:
        known = ", ".join(("default", "gpt-2", "smollm", *rules))
        raise UserError(f"{where}: {PREFIX}pre is {pre!r}, a rule that is not known here; known: {known}")
    split = pre_tokenizers.Split(Regex(rules[pre]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Content of tokenizer_config.json."""
    tokens = fields[f"{PREFIX}tokens"]
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = fields.get(f"{PREFIX}{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            settings[f"{name}_token"] = tokens[number]
    architecture = fields.get("general.architecture")
    if (length := fields.get(f"{architecture}.context_length")) is not None:
        settings["model_max_length"] = length
    if (template := fields.get("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    return settings
