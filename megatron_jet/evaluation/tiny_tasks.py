"""This project's evaluation sets as harness documents: JSON lines in a folder, read by the task files in `tasks/`.

A document is one question: what stands before it, and the answer. Contexts and answers are text wherever the tokenizer
gives back the very tokens of the evaluation set; where it cannot (a window of bytes may begin inside a character),
they are token ids behind a marker that `HarnessModel` understands.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_text
from megatron_jet.tasks.evalset import IGNORED, EvalSet

TASKS_DIR = Path(__file__).parent / "tasks"
PREFIX = "tiny_"
TINY_TASKS = tuple(sorted(path.stem for path in TASKS_DIR.glob(f"{PREFIX}*.yaml")))
TOKEN_IDS = "<|token_ids|>"


def write_documents(eval_sets: Sequence[EvalSet], tokenizer: PreTrainedTokenizerBase, out_dir: Path) -> list[str]:
    """Write `<name>.jsonl` for every evaluation set that has a task.

    Args:
        eval_sets: of one split.
        tokenizer: the model's.
        out_dir: an existing folder.

    Returns:
        Names of the tasks that can now run.
    """
    written = []
    for evalset in eval_sets:
        if PREFIX + evalset.name in TINY_TASKS:
            lines = (json.dumps(document) for document in documents(evalset, tokenizer))
            write_text(out_dir / f"{evalset.name}.jsonl", "\n".join(lines) + "\n")
            written.append(PREFIX + evalset.name)
    return written


def documents(evalset: EvalSet, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """The questions of an evaluation set, in the order of its sequences and positions.

    Raises:
        UserError: an answer that is none of the choices.
    """
    for row in range(len(evalset.tokens)):
        tokens, labels = evalset.tokens[row].tolist(), evalset.labels[row].tolist()
        where = {"sequence": row}
        if evalset.metric == "loss":
            for start, end in scored_runs(labels):
                context, (target,) = spell(tokenizer, tokens[: start + 1], [labels[start:end]])
                yield {**where, "context": context, "target": target, "tokens": end - start}
            continue
        for position in torch.tensor(labels).ne(IGNORED).nonzero().flatten().tolist():
            where["position"] = position + 1
            if evalset.metric == "choice":
                if labels[position] not in evalset.choices:
                    problem = f"answer {labels[position]} is none of its choices"
                    raise UserError(f"source '{evalset.name}': {problem}; prepare the data again")
                context, choices = spell(tokenizer, tokens[: position + 1], [[token] for token in evalset.choices])
                answer = evalset.choices.index(labels[position])
                yield {**where, "context": context, "choices": choices, "answer": answer}
            else:
                context, (target,) = spell(tokenizer, tokens[: position + 1], [[labels[position]]])
                yield {**where, "context": context, "target": target}


def scored_runs(labels: list[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of every run of scored positions."""
    begin = None
    for position, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and begin is None:
            begin = position
        elif label == IGNORED and begin is not None:
            yield begin, position
            begin = None


def spell(tokenizer: PreTrainedTokenizerBase, context: list[int], targets: list[list[int]]) -> tuple[str, list[str]]:
    """Context and targets as strings that the harness turns into the same tokens again.

    The harness encodes context and target together and moves white space between them, so both are tried that way.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text, answers = decode(context), [decode(target) for target in targets]
    faithful = text and text == text.strip() and tokenizer.encode(text) == context
    if faithful and all(tokenizer.encode(text + a) == context + t for a, t in zip(answers, targets, strict=True)):
        return text, answers
    return spell_ids(context), [spell_ids(target) for target in targets]


def spell_ids(ids: Iterable[int]) -> str:
    """Token ids as a string; `read_ids` is its inverse."""
    return TOKEN_IDS + " ".join(str(token) for token in ids)


def read_ids(string: str) -> list[int] | None:
    """Token ids of a string made by `spell_ids`; None for any other string."""
    if not string.startswith(TOKEN_IDS):
        return None
    return [int(word) for word in string.removeprefix(TOKEN_IDS).split()]


def load_documents(data_dir: str, name: str, **_: Any) -> dict[str, Any]:
    """What the task files call: the documents of one evaluation set as the split "test".

    Args:
        data_dir: folder of `write_documents`; given as metadata of the task manager.
        name: of the evaluation set, from the task file.

    Raises:
        UserError: no such file.
    """
    from datasets import Dataset

    path = Path(data_dir) / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the prepared data has no evaluation set '{name}'")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def score_answer(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Accuracy (the answer is the most likely of all tokens) and loss (nats) of one answer token."""
    ((log_likelihood, greedy),) = results
    return {"accuracy": float(greedy), "loss": -log_likelihood}


def score_choice(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Accuracy among the choices, and loss (nats) of the right one."""
    log_likelihoods = [log_likelihood for log_likelihood, _ in results]
    best = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
    return {"accuracy": float(best == document["answer"]), "loss": -log_likelihoods[document["answer"]]}


def score_text(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Loss (nats) and number of tokens of a run of text."""
    ((log_likelihood, _),) = results
    return {"loss": (-log_likelihood, document["tokens"])}


def weighted_mean(items: Sequence[tuple[float, int]]) -> float:
    """Sum over tokens divided by their number."""
    return sum(total for total, _ in items) / sum(count for _, count in items)
