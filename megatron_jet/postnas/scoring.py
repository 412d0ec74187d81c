"""Score layer plans of one model or supernet on evaluation sets, by teacher-forced likelihood on the Megatron model.

All plans are scored in one walk over their shared prefixes per batch; every metric comes from the same forward. The
batches are dealt out to the ranks, each of which holds a whole model. Partial sums are merged in the order of the
batches, so the scores do not depend on the number of ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_jet.configs.base import ResultModel
from megatron_jet.configs.layer_plan import LayerPlan
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.results import Scores
from megatron_jet.configs.stages import EvalConfig
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.evaluation.hf_scores import as_scores
from megatron_jet.model.builder import build_model
from megatron_jet.model.paths import Choices
from megatron_jet.model.stepwise import embed, head, run_layer
from megatron_jet.postnas.processes import gather, on_main, rank, world_size
from megatron_jet.postnas.stage import StageContext
from megatron_jet.postnas.trie import build_trie, count_layers, walk
from megatron_jet.tasks.evalset import EvalSet, Scorer, load_eval_sets
from megatron_jet.training.checkpoint import load_model
from megatron_jet.training.parallel import parallel_session


class ScoredPlans(ResultModel):
    """Scores of some plans, in their order, and layer forwards (per sequence batch) done and without sharing."""

    scores: list[Scores]
    layer_forwards: int
    layer_forwards_naive: int


@dataclass(frozen=True)
class Unit:
    """A batch of one evaluation set: what is dealt out to ranks."""

    set_index: int
    rows: slice


@dataclass
class PlanScorer:
    """Scores plans of a model that this process holds in full.

    Attributes:
        model: chunk with all layers; a supernet if plans are to differ.
        sets: evaluation sets.
        batch_size: sequences per forward.
    """

    model: nn.Module
    sets: list[EvalSet]
    batch_size: int
    units: list[Unit] = field(init=False)

    def __post_init__(self):
        self.model.eval()
        self.units = [
            Unit(i, slice(start, min(start + self.batch_size, len(evalset.tokens))))
            for i, evalset in enumerate(self.sets)
            for start in range(0, len(evalset.tokens), self.batch_size)
        ]

    @torch.no_grad()
    def score(self, plans: Sequence[LayerPlan]) -> ScoredPlans:
        """Scores of each plan, in order. Collective."""
        trie = build_trie(plans)
        own = {
            index: self._score_unit(index, trie, len(plans)) for index in range(rank(), len(self.units), world_size())
        }
        sums: dict[int, list[dict[str, float]]] = {}
        for part in gather(own):
            sums |= part
        return ScoredPlans(
            scores=[self._merged(sums, plan) for plan in range(len(plans))],
            layer_forwards=count_layers(trie),
            layer_forwards_naive=sum(len(plan) for plan in plans),
        )

    def _score_unit(self, index: int, trie, num_plans: int) -> list[dict[str, float]]:
        """Partial sums of every plan on one batch."""
        unit = self.units[index]
        evalset = self.sets[unit.set_index]
        sums: list[dict[str, float]] = [{}] * num_plans
        tokens = evalset.tokens[unit.rows].to(next(self.model.parameters()).device)  # [b, s]

        def leaf(plan: int, hidden: Tensor) -> None:
            scorer = Scorer(evalset)
            # A vocabulary is many times wider than the hidden state: the head sees scored positions only.
            scorer.update_scored(unit.rows, hidden.transpose(0, 1), self._logits)
            sums[plan] = scorer.sums()

        def layer(depth: int, entry: str, hidden: Tensor) -> Tensor:
            return run_layer(self.model, depth, hidden, path=entry)

        walk(trie, embed(self.model, tokens), layer, leaf)
        return sums

    def _logits(self, hidden: Tensor) -> Tensor:
        """Any tokens [n, h] -> [n, vocab] fp32."""
        return head(self.model, hidden[:, None])[0].float()

    def _merged(self, sums: dict[int, list[dict[str, float]]], plan: int) -> Scores:
        scorers = [Scorer(evalset) for evalset in self.sets]
        for index in range(len(self.units)):
            scorers[self.units[index].set_index].merge(sums[index][plan])
        return as_scores({scorer.evalset.name: scorer.result() for scorer in scorers})


@contextmanager
def plan_scorer(
    ctx: StageContext,
    model: ModelConfig,
    checkpoint: Path,
    split: str,
    evaluation: EvalConfig,
    choices: Choices | None = None,
) -> Iterator[PlanScorer]:
    """A scorer for a checkpoint of any layout; every rank holds the whole model while the block runs. Collective."""
    layout = ParallelConfig()
    with parallel_session(layout, ctx.config.seed):
        chunks = build_model(model, layout, dtype=ctx.config.dtype, choices=choices, init_seed=None)
        load_model(chunks, checkpoint)
        yield PlanScorer(chunks[0], eval_sets(ctx, split, evaluation), evaluation.batch_size)


def score_checkpoint(
    ctx: StageContext, model: ModelConfig, checkpoint: Path, split: str, evaluation: EvalConfig
) -> Scores:
    """Scores of one plain model. Collective."""
    with plan_scorer(ctx, model, checkpoint, split, evaluation) as scorer:
        return scorer.score([model.layer_plan]).scores[0]


def eval_sets(ctx: StageContext, split: str, evaluation: EvalConfig) -> list[EvalSet]:
    """The first `samples` sequences of every evaluation set of a split."""
    return load_eval_sets(ctx.data.path, split, evaluation.samples)


def check_eval_sets(ctx: StageContext, split: str, evaluation: EvalConfig) -> None:
    """Read the evaluation sets once, so that bad ones are found before a training and not after it. Collective."""
    on_main(lambda: len(eval_sets(ctx, split, evaluation)))
