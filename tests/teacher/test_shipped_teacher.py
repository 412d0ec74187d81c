"""The teacher in the package: whole, small, and as able as its card says, on samples nobody has seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatron_jet
from megatron_jet.configs.results import Scores
from megatron_jet.tasks import synthetic
from megatron_jet.tasks import vocabulary as vocab
from megatron_jet.teacher.publish import Origin, card, draw_curve
from megatron_jet.teacher.scores import attention_off

SHIPPED = Path(megatron_jet.__file__).parent / "teachers" / "tiny"


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(SHIPPED).eval()


@torch.no_grad()
def accuracy(model, tokens: np.ndarray, mask: np.ndarray) -> float:
    logits = model(input_ids=torch.from_numpy(tokens[:, :-1])).logits  # [b, s, v]
    answers = torch.from_numpy(mask[:, 1:]).bool()
    return (logits.argmax(-1) == torch.from_numpy(tokens[:, 1:]))[answers].float().mean().item()


def samples(task: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([424242, len(task)])
    if task == "recall":
        return synthetic.recall(rng, 8, num_pairs=32, num_queries=64)
    return synthetic.choice(rng, 16, num_questions=21)


@pytest.mark.parametrize("task", ["recall", "choice"])
def test_abilities_on_fresh_samples(teacher, task):
    """Above 90%, the goal, with 0.03 to spare for 336 questions of which each fails independently."""
    assert accuracy(teacher, *samples(task)) > 0.93


def test_answers_come_from_the_context(teacher):
    """With other values in the list the old answers must not come where a key is asked for the first time."""
    tokens, mask = samples("recall")
    for row, answers in zip(tokens, mask, strict=True):
        keys = row[np.flatnonzero(answers) - 1]
        again = np.setdiff1d(np.arange(len(keys)), np.unique(keys, return_index=True)[1])
        answers[np.flatnonzero(answers)[again]] = 0
    tokens[:, 2:65:2] = (tokens[:, 2:65:2] - vocab.VALUES + 1) % vocab.NUM_VALUES + vocab.VALUES
    assert accuracy(teacher, tokens, mask) < 0.2


def test_knocking_out_a_layer_matters_and_ends(teacher):
    tokens, mask = (part[:4] for part in samples("recall"))
    with attention_off(teacher, 0):
        assert accuracy(teacher, tokens, mask) < 0.3
    assert accuracy(teacher, tokens, mask) > 0.9


def test_directory_is_complete_and_small(teacher):
    names = {path.name for path in SHIPPED.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md",
                     "tokenizer_config.json", "scores.json", "manifest.json", "curve.jsonl", "curve.png"}  # fmt: skip
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 8 << 20
    assert teacher.num_parameters() < 2_000_000 and teacher.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(SHIPPED)) == vocab.VOCAB_SIZE == teacher.config.vocab_size
    manifest = json.loads((SHIPPED / "manifest.json").read_text())
    splits = manifest["files"]
    assert not set(splits["train"]) & (set(splits["search"]) | set(splits["heldout"]))
    scores = json.loads((SHIPPED / "scores.json").read_text())
    Scores.parse(scores["heldout"])
    assert len(scores["without_attention_of_layer"]) == teacher.config.num_hidden_layers


def test_card_states_the_scores(teacher, tmp_path):
    scores = json.loads((SHIPPED / "scores.json").read_text())
    rows = [json.loads(line) for line in (SHIPPED / "curve.jsonl").read_text().splitlines()]
    text = card(teacher, scores, rows[-1], Origin("python tools/train_teacher.py OUT_DIR", 5, "A remark."))
    assert f"{scores['heldout']['accuracy']['recall']:.3f}" in text and "A remark." in text and "seed 5" in text
    draw_curve(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
