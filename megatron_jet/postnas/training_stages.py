"""stage1 (MLPs frozen, distillation) and stage2 (the whole model) of the architecture found."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.results import Measured, Scores, TrainStageResult
from megatron_jet.configs.run_estimate import known_student
from megatron_jet.configs.upstream import last_selection
from megatron_jet.postnas.jobs import Start, first_weights, train_student
from megatron_jet.postnas.scoring import score_checkpoint
from megatron_jet.postnas.selection import candidate_model, selected_mixer, winner_checkpoint
from megatron_jet.postnas.stage import StageContext, common_inputs, persisted

JOB = "student"


@dataclass(frozen=True)
class TrainStage:
    """Trains the final model, in two stages that differ in their settings and in what they start from.

    Attributes:
        follows: the stage whose checkpoint it continues; None: first weights from the teacher or the search.
    """

    name: str
    follows: str | None = None
    kept: tuple[str, ...] = ()

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        upstream = ["prepare"]
        if ctx.config.student_plan is None:
            upstream.append("placement")
        if self.follows is not None:
            upstream.append(self.follows)
        if self._continues_search(ctx):
            upstream.append(last_selection(ctx.config))
        return common_inputs(ctx, self.name, *upstream) | {"model": final_model(ctx).to_dict()}

    def run(self, ctx: StageContext, inputs_hash: str) -> TrainStageResult:
        model = final_model(ctx)
        start = self._start(ctx)
        ctx.status.phase("scoring the first weights")
        before = self._scores(ctx, model, "before", lambda: first_weights(ctx, self.name, JOB, model, start))
        trained = train_student(ctx, self.name, JOB, model, ctx.config.stage(self.name).training, start=start)
        checkpoint = trained.best_checkpoint or trained.checkpoint
        ctx.status.phase("scoring the final weights")
        return TrainStageResult(
            stage=self.name,
            inputs_hash=inputs_hash,
            tokens=trained.tokens,
            plan=model.layer_plan,
            model_config_=model.to_dict(),
            checkpoint=ctx.relative(checkpoint),
            final_losses=trained.final_losses,
            validation=trained.validation,
            before=before,
            after=self._scores(ctx, model, "after", lambda: checkpoint),
            measured=Measured(
                seconds=ctx.status.seconds,
                train_tokens_per_second=trained.tokens_per_second,
                extra={"training_seconds": trained.seconds},
            ),
        )

    def _start(self, ctx: StageContext) -> Start:
        if self.follows is not None:
            return Start(checkpoint=ctx.path(ctx.result(self.follows).checkpoint))
        if self._continues_search(ctx):
            return Start(checkpoint=winner_checkpoint(ctx))
        return Start(init="teacher")

    def _continues_search(self, ctx: StageContext) -> bool:
        return self.follows is None and ctx.config.stage(self.name).init == "search"

    def _scores(self, ctx: StageContext, model: ModelConfig, name: str, checkpoint: Callable[[], Path]) -> Scores:
        """Held-out scores, kept on disk."""
        evaluation = ctx.config.stage(self.name).eval
        return persisted(
            ctx.stage_dir(self.name) / f"{name}.json",
            Scores,
            lambda: score_checkpoint(ctx, model, checkpoint(), ctx.data.heldout_split, evaluation),
        )


def final_model(ctx: StageContext) -> ModelConfig:
    """The student: of the recipe's `student_plan`, or of the placement and the mixer that the search found."""
    if ctx.config.student_plan is not None:
        return known_student(ctx.config, ctx.config.student_plan, ctx.teacher)
    return candidate_model(ctx, selected_mixer(ctx))


STAGE1 = TrainStage("stage1")
STAGE2 = TrainStage("stage2", follows="stage1")
