"""What the teacher can do: scores on data it did not train on, and which attention layers each ability needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Qwen2ForCausalLM

from megatron_jet.configs.results import Scores
from megatron_jet.evaluation.hf_scores import score_hf
from megatron_jet.tasks.evalset import load_eval_sets

BATCH_SIZE = 16
KNOCK_OUT_SAMPLES = 64


def score_split(model: Qwen2ForCausalLM, data: Path, split: str, samples: int) -> Scores:
    """Scores the first `samples` sequences of every evaluation set of a split of prepared data."""
    model.eval()
    return score_hf(model, [evalset.first(samples) for evalset in load_eval_sets(data, split)], BATCH_SIZE)


def knock_outs(model: Qwen2ForCausalLM, data: Path, split: str) -> list[Scores]:
    """Scores with the output of one attention layer set to zero, for every layer in turn."""
    scores = []
    for layer in range(model.config.num_hidden_layers):
        with attention_off(model, layer):
            scores.append(score_split(model, data, split, KNOCK_OUT_SAMPLES))
    return scores


@contextmanager
def attention_off(model: Qwen2ForCausalLM, layer: int) -> Iterator[None]:
    """Sets the attention output of one layer to zero while the block runs."""
    weight = model.model.layers[layer].self_attn.o_proj.weight.data
    kept = weight.clone()
    weight.zero_()
    try:
        yield
    finally:
        weight.copy_(kept)
