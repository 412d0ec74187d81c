"""Score a Hugging Face model on evaluation sets, by the same rules as the Megatron model."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from megatron_jet.configs.results import Scores
from megatron_jet.tasks.evalset import EvalSet, Scorer


@torch.no_grad()
def score_hf(model: PreTrainedModel, sets: Sequence[EvalSet], batch_size: int) -> Scores:
    """Accuracy and loss of every set.

    Args:
        model: in eval mode.
        sets: evaluation sets whose token ids are the model's.
        batch_size: sequences per forward.
    """
    results = {}
    for evalset in sets:
        scorer = Scorer(evalset)
        for start in range(0, len(evalset.tokens), batch_size):
            rows = slice(start, min(start + batch_size, len(evalset.tokens)))
            tokens = evalset.tokens[rows].to(model.device)  # [b, s]
            scorer.update(rows, model(input_ids=tokens, use_cache=False).logits.float())
        results[evalset.name] = scorer.result()
    return as_scores(results)


def as_scores(results: dict[str, dict[str, float]]) -> Scores:
    """Results of scorers by evaluation set."""
    return Scores(
        accuracy={name: row["accuracy"] for name, row in results.items() if "accuracy" in row},
        loss={name: row["loss"] for name, row in results.items()},
        error={name: row["error"] for name, row in results.items() if "error" in row},
        sequences={name: row["sequences"] for name, row in results.items() if "sequences" in row},
    )
