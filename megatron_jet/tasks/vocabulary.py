"""Token ids of the tiny teacher: 256 bytes, then special tokens for the synthetic tasks.

Bytes are tokens 0..255, so text needs no learned tokenizer and a reader can decode any sample by eye. The synthetic
tasks use symbols of their own, so that text statistics neither help nor hurt them.
"""

NUM_BYTES = 256

END_OF_TEXT = 256  # also bos, eos and padding
RECALL = 257  # opens a recall sample
QUERY = 258  # ends the list of pairs, starts the queries
CHOICE = 259  # opens a multiple-choice question
QUESTION = 260  # ends the options; the entity asked about follows
COPY = 261  # opens a copy sample
ANSWER = 262  # the next token answers the question before it

LETTERS = 264  # A B C D
NUM_LETTERS = 4
_SPARE = 4

KEYS = LETTERS + NUM_LETTERS + _SPARE
NUM_KEYS = 64
VALUES = KEYS + NUM_KEYS
NUM_VALUES = 64
ENTITIES = VALUES + NUM_VALUES
NUM_ENTITIES = 64
ATTRIBUTES = ENTITIES + NUM_ENTITIES
NUM_ATTRIBUTES = 48

VOCAB_SIZE = ATTRIBUTES + NUM_ATTRIBUTES  # 512


def special_tokens() -> dict[str, int]:
    """Returns every added token's text and its id, in id order and without gaps from 256 to VOCAB_SIZE - 1."""
    names = {END_OF_TEXT: "<|endoftext|>", RECALL: "<|recall|>", QUERY: "<|query|>", CHOICE: "<|choice|>",
             QUESTION: "<|question|>", COPY: "<|copy|>", ANSWER: "<|answer|>"}  # fmt: skip
    names |= {LETTERS + i: f"<|{letter}|>" for i, letter in enumerate("ABCD")}
    for stem, first, count in (("k", KEYS, NUM_KEYS), ("v", VALUES, NUM_VALUES), ("e", ENTITIES, NUM_ENTITIES),
                               ("x", ATTRIBUTES, NUM_ATTRIBUTES)):  # fmt: skip
        names |= {first + i: f"<|{stem}{i}|>" for i in range(count)}
    return {names.get(i, f"<|spare{i}|>"): i for i in range(NUM_BYTES, VOCAB_SIZE)}
