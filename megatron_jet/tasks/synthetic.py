"""Generators of the synthetic tasks: associative recall, multiple choice, copying.

Every generator takes a numpy Generator and sizes and returns `(tokens, mask)`: tokens int64 `[n, t]` and mask uint8
`[n, t]`, one where the token is an answer, that is where it counts as a target. Nothing here is trained or stored:
a seed gives a task set back exactly.
"""

import numpy as np

from megatron_jet.tasks import vocabulary as vocab

FACT_SEED = 20260101
NAME_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz_0123456789", np.uint8).astype(np.int64)
MIN_SPAN, MAX_SPAN = 16, 64  # tokens of a span that comes back
SPAN_LEAD = 3  # tokens of its second copy that are not scored: they tell which span is coming back


def fact_table() -> np.ndarray:
    """Returns the attribute of every entity, `[NUM_ENTITIES]`, values in 0..NUM_ATTRIBUTES-1.

    The table is fixed, so that a model can learn it by heart; the questions about it are drawn anew each time.
    """
    return np.random.default_rng(FACT_SEED).integers(0, vocab.NUM_ATTRIBUTES, vocab.NUM_ENTITIES)


def distinct(rng: np.random.Generator, n: int, population: int, count: int) -> np.ndarray:
    """Draws `count` different numbers below `population` for each of `n` rows; returns `[n, count]`."""
    return rng.random((n, population)).argsort(axis=1)[:, :count]


def recall_length(num_pairs: int, num_queries: int) -> int:
    """Returns the number of tokens of a recall sample."""
    return 2 + 2 * num_pairs + 2 * num_queries


def recall(
    rng: np.random.Generator,
    n: int,
    num_pairs: int,
    num_queries: int,
    num_keys: int = vocab.NUM_KEYS,
    hint: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927).

    A sample is `<|recall|> k v k v ... <|query|> k v k v ...`: different keys, values drawn independently, then keys
    drawn independently with replacement, each followed by its value, which is the answer. Finding it takes two
    steps: link each value with the key before it, then match the key asked for.

    Args:
        rng: source of randomness.
        n: number of samples.
        num_pairs: pairs to remember, at most `num_keys`.
        num_queries: keys asked for.
        num_keys: keys in use, the first of the vocabulary.
        hint: for training only: the probability that a value comes from the four that belong to its key's class. A
            model finds such a value in one step, which teaches it to match before it can link.

    Returns:
        tokens and mask, both `[n, recall_length(num_pairs, num_queries)]`.
    """
    keys = distinct(rng, n, num_keys, num_pairs)  # [n, p]
    values = rng.integers(0, vocab.NUM_VALUES, (n, num_pairs))  # [n, p]
    if hint > 0:
        per_class = 4
        classes = keys % (vocab.NUM_VALUES // per_class)
        hinted = classes * per_class + rng.integers(0, per_class, (n, num_pairs))
        values = np.where(rng.random((n, num_pairs)) < hint, hinted, values)
    keys, values = keys + vocab.KEYS, values + vocab.VALUES
    asked = rng.integers(0, num_pairs, (n, num_queries))  # [n, q]
    tokens = np.zeros((n, recall_length(num_pairs, num_queries)), np.int64)
    mask = np.zeros(tokens.shape, np.uint8)
    split = 1 + 2 * num_pairs
    tokens[:, 0], tokens[:, split] = vocab.RECALL, vocab.QUERY
    tokens[:, 1:split:2], tokens[:, 2:split:2] = keys, values
    tokens[:, split + 1 :: 2] = np.take_along_axis(keys, asked, 1)
    tokens[:, split + 2 :: 2] = np.take_along_axis(values, asked, 1)
    mask[:, split + 2 :: 2] = 1
    return tokens, mask


CHOICE_LENGTH = 12  # tokens of one multiple-choice question


def choice(rng: np.random.Generator, n: int, num_questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Multiple choice over the fixed fact table.

    A question is `<|choice|> A x B x C x D x <|question|> e letter`: four different attributes of which one is the
    attribute of entity e; the answer is its letter. The options, their order and the entity are drawn anew, so the
    answer needs both the fact (from the weights) and a look at the options (from the context). A sample holds
    several questions about different entities, so that no earlier answer gives a later one away.

    Returns:
        tokens and mask, both `[n, CHOICE_LENGTH * num_questions]`.
    """
    facts = fact_table()
    entities = distinct(rng, n, vocab.NUM_ENTITIES, num_questions)  # [n, m]
    truth = facts[entities]  # [n, m]
    # Other attributes are the true one plus different non-zero shifts, modulo their number.
    shifts = distinct(rng, n * num_questions, vocab.NUM_ATTRIBUTES - 1, vocab.NUM_LETTERS) + 1
    options = (truth[..., None] + shifts.reshape(n, num_questions, vocab.NUM_LETTERS)) % vocab.NUM_ATTRIBUTES
    right = rng.integers(0, vocab.NUM_LETTERS, (n, num_questions))  # [n, m]
    np.put_along_axis(options, right[..., None], truth[..., None], axis=2)
    tokens = np.zeros((n, num_questions, CHOICE_LENGTH), np.int64)
    tokens[..., 0], tokens[..., 9] = vocab.CHOICE, vocab.QUESTION
    tokens[..., 1:9:2] = vocab.LETTERS + np.arange(vocab.NUM_LETTERS)
    tokens[..., 2:9:2] = vocab.ATTRIBUTES + options
    tokens[..., 10] = vocab.ENTITIES + entities
    tokens[..., 11] = vocab.LETTERS + right
    mask = np.zeros(tokens.shape, np.uint8)
    mask[..., 11] = 1
    return tokens.reshape(n, -1), mask.reshape(n, -1)


def alternating(rng: np.random.Generator, n: int, length: int, alphabet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs `a b a b a b ...` of two random tokens each, 6 to 10 tokens long; the answer is the token before.

    For training only: it grows a head that looks one token back, which recall and copying both need.

    Returns:
        tokens and mask, both `[n, length]`.
    """
    tokens = np.full((n, length), vocab.COPY, np.int64)
    mask = np.zeros(tokens.shape, np.uint8)
    for row in range(n):
        start = 1
        while start < length:
            end = min(length, start + 2 * int(rng.integers(3, 6)))
            tokens[row, start:end] = np.resize(rng.choice(alphabet, 2), end - start)
            mask[row, start + 2 : end] = 1
            start = end
    return tokens, mask


def repeated(rng: np.random.Generator, n: int, length: int, alphabet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different random tokens that come again and again in the same order, with a period drawn per sample.

    The period lies between an eighth and a half of the length. Everything past the first period is an answer but for
    a few tokens, as in `copy`. For training only: as no token comes twice in a period, one token back tells what
    follows, and nearly every token teaches copying, where text with a repeated span has few such tokens.

    Args:
        rng: source of randomness.
        n: number of samples.
        length: tokens per sample.
        alphabet: at least `length // 2` different tokens.

    Returns:
        tokens and mask, both `[n, length]`.
    """
    symbols = alphabet[distinct(rng, n, len(alphabet), length // 2)]  # [n, length // 2]
    period = rng.integers(length // 8, length // 2 + 1, n)[:, None]  # [n, 1]
    column = np.arange(length)[None]
    tokens = np.take_along_axis(symbols, column % period, 1).astype(np.int64)
    return tokens, (column >= period + SPAN_LEAD).astype(np.uint8)


def copy(rng: np.random.Generator, text: np.ndarray, n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Text in which spans of 16 to 64 tokens appear twice; the answers are the second copies past their first tokens.

    Half of the spans are text from elsewhere, half are random letters, digits and underscores, which no statistics of
    text foretell. The two copies lie at random places of the sample's first and second half.

    Args:
        rng: source of randomness.
        text: tokens of a split's documents, `[m]`.
        n: number of samples.
        length: tokens per sample, at least 4 * MIN_SPAN.

    Returns:
        tokens and mask, both `[n, length]`.
    """
    tokens = windows(rng, text, n, length)
    mask = np.zeros(tokens.shape, np.uint8)
    longest = min(MAX_SPAN, length // 4)
    for row in range(n):
        size = int(rng.integers(MIN_SPAN, longest + 1))
        if rng.random() < 0.5:
            span = windows(rng, text, 1, size)[0]
        else:
            span = NAME_LETTERS[rng.integers(0, len(NAME_LETTERS), size)]
        first = int(rng.integers(0, length // 2 - size + 1))
        second = int(rng.integers(length // 2, length - size + 1))
        tokens[row, first : first + size] = span
        tokens[row, second : second + size] = span
        mask[row, second + SPAN_LEAD : second + size] = 1
    return tokens, mask


def windows(rng: np.random.Generator, text: np.ndarray, n: int, length: int) -> np.ndarray:
    """Cuts `n` windows of `length` tokens from `text`, `[m]`, at random places; returns int64 `[n, length]`."""
    starts = rng.integers(0, len(text) - length + 1, n)
    return text[starts[:, None] + np.arange(length)].astype(np.int64)
