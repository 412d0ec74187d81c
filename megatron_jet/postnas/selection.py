"""block_selection, new_block, hardware_search: equal training for every candidate, then a ranking.

A candidate's result is written as soon as it is scored. Candidates may also run as jobs of their own, several at the
same time; each writes to its own directory only, and the stage then finds their results and ranks them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_jet.configs.candidates import (
    Candidate,
    candidate_names,
    candidate_recipe,
    named_candidate,
    resized_candidate,
    taken_over,
)
from megatron_jet.configs.cost import analytic_tokens_per_second, model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_json, read_json_object, write_json
from megatron_jet.configs.layer_plan import LayerPlan
from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.results import CandidateResult, Measured, SelectionResult
from megatron_jet.configs.stages import ThroughputConfig
from megatron_jet.configs.upstream import last_selection
from megatron_jet.convert.student import student_plan
from megatron_jet.evaluation.throughput.stages import measure_generation
from megatron_jet.postnas.jobs import Start, remove_checkpoints, train_student
from megatron_jet.postnas.processes import on_main
from megatron_jet.postnas.ranking import Ranking, rank_by_accuracy, rank_within_throughput
from megatron_jet.postnas.scoring import check_eval_sets, score_checkpoint
from megatron_jet.postnas.stage import StageContext, clear_directory, common_inputs, persisted, read_model


@dataclass(frozen=True)
class SelectionStage:
    """One of the three. They differ in where candidates come from and in how they are ranked."""

    name: str
    make: Callable[[StageContext, str], Candidate]
    rank: Callable[[list[CandidateResult], ThroughputConfig], Ranking]
    kept: tuple[str, ...] = ("jobs",)  # candidates know themselves what they depend on

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        names = candidate_names(ctx.config, self.name)
        candidates = {name: self.make(ctx, name).to_dict() for name in names}
        return common_inputs(ctx, self.name, "prepare", "placement") | {"candidates": candidates}

    def run(self, ctx: StageContext, inputs_hash: str) -> SelectionResult:
        names = candidate_names(ctx.config, self.name)
        results = [self.run_candidate(ctx, name) for name in names]
        settings = ctx.config.stage(self.name)
        ranking = self.rank(results, settings.throughput)
        winner = next(result for result in results if result.name == ranking.winner)
        on_main(lambda: self._remove_weights(ctx, names, ranking.winner))
        return SelectionResult(
            stage=self.name,
            inputs_hash=inputs_hash,
            tokens=sum(result.tokens for result in results if result.reused_from is None),
            candidates=results,
            ranking=ranking.order,
            winner=ranking.winner,
            winner_mixer=winner.mixer,
            winner_config=winner.mixer_config,
            rule=ranking.rule,
            pareto=ranking.pareto,
            measured=Measured(seconds=ctx.status.seconds),
        )

    def run_candidate(self, ctx: StageContext, name: str) -> CandidateResult:
        """Train, score and time one candidate, unless its result or that of an equal one is there. Collective."""
        candidate = self.make(ctx, name)
        recipe = hash_json(self._recipe(ctx, candidate))
        on_main(lambda: open_candidate(self._job(ctx, name), recipe))
        return persisted(
            self._job(ctx, name) / "result.json",
            CandidateResult,
            lambda: on_main(lambda: self._reused(ctx, candidate, recipe)) or self._trained(ctx, candidate, recipe),
        )

    def _trained(self, ctx: StageContext, candidate: Candidate, recipe: str) -> CandidateResult:
        settings = ctx.config.stage(self.name)
        model = candidate_model(ctx, candidate.mixer)
        check_eval_sets(ctx, ctx.data.search_split, settings.eval)
        trained = train_student(
            ctx, self.name, candidate.name, model, settings.training, start=Start(init=settings.init)
        )
        ctx.status.phase(f"scoring {candidate.name}")
        scores = score_checkpoint(ctx, model, trained.checkpoint, ctx.data.search_split, settings.eval)
        contexts = settings.throughput.contexts
        speed = None
        if settings.throughput.timed:
            ctx.status.phase(f"timing {candidate.name}")
            speed = on_main(lambda: measure_generation(model, settings.throughput, ctx.config.dtype))
        return CandidateResult(
            name=candidate.name,
            mixer=candidate.mixer.kind,
            mixer_config=candidate.mixer.to_dict(),
            params=model_cost(model, max(contexts)).total_params,
            state_bytes=candidate.mixer.cache_bytes(model.shape, max(contexts)),
            analytic_flops_per_token=model_cost(model, max(contexts)).flops_per_token,
            scores=scores,
            final_losses=trained.final_losses,
            tokens=trained.tokens,
            analytic_tokens_per_second={
                str(context): analytic_tokens_per_second(model, context, settings.throughput.batch_size)
                for context in contexts
            },
            recipe_hash=recipe,
            ablation=candidate.ablation,
            measured=Measured(
                seconds=trained.seconds,
                train_tokens_per_second=trained.tokens_per_second,
                generation_tokens_per_second=speed and speed.generation,
                prefill_tokens_per_second=speed and speed.prefill,
                extra={"batch_size": speed.batch_size} if speed else {},
            ),
        )

    def _reused(self, ctx: StageContext, candidate: Candidate, recipe: str) -> CandidateResult | None:
        """An equal candidate of an earlier stage: same mixer, training, data and evaluation give the same result."""
        for stage in taken_over(ctx.config, self.name):
            for path in sorted(ctx.stage_dir(stage).glob("jobs/*/result.json")):
                try:
                    found = read_model(path, CandidateResult)
                except UserError:
                    continue  # not what was written: nothing to rely on
                if found.recipe_hash == recipe and found.reused_from is None:
                    return found.replace(name=candidate.name, reused_from=stage)
        return None

    def _recipe(self, ctx: StageContext, candidate: Candidate) -> dict[str, Any]:
        """What decides a candidate's result."""
        return {
            **{key: value for key, value in common_inputs(ctx, self.name, "prepare").items() if key != "settings"},
            "plan": ctx.upstream("placement")["plan"],
            **candidate_recipe(ctx.config, self.name, candidate),
        }

    def _job(self, ctx: StageContext, name: str) -> Path:
        return ctx.stage_dir(self.name) / "jobs" / name

    def _remove_weights(self, ctx: StageContext, names: tuple[str, ...], winner: str) -> None:
        if ctx.config.stage(self.name).keep_checkpoints:
            return
        continued = ctx.config.stage1.init == "search" and self.name == last_selection(ctx.config)
        for name in names:
            if not (continued and name == winner):
                remove_checkpoints(ctx, self.name, name)


def open_candidate(directory: Path, recipe: str) -> None:
    """Empty a candidate's directory when it belongs to another recipe. Rank 0 only."""
    record = directory / "recipe.json"
    if os.path.lexists(record) and _recorded(record) != recipe:
        clear_directory(directory, keep=("log.txt", "status.json"))
    write_json(record, {"hash": recipe})


def _recorded(record: Path) -> Any:
    """The hash in recipe.json; None where the file is odd."""
    try:
        return read_json_object(record).get("hash")
    except UserError:
        return None


def candidate_model(ctx: StageContext, mixer: MixerConfig) -> ModelConfig:
    """The teacher's model with a mixer in every linear layer of the placement found."""
    plan: LayerPlan = tuple(ctx.result("placement").plan)
    return ctx.teacher.with_plan(student_plan(plan, mixer.kind), {mixer.kind: mixer})


def block_candidate(ctx: StageContext, name: str) -> Candidate:
    """A candidate by its name in the config."""
    return named_candidate(ctx.config, name)


def grid_candidate(ctx: StageContext, name: str) -> Candidate:
    """A point of the grid, as sizes of the mixer to resize."""
    settings = ctx.config.hardware_search
    point = next(point for point in settings.grid if point.name == name)
    mixer = ctx.config.mixers[settings.mixer] if settings.mixer else selected_mixer(ctx, before="hardware_search")
    return resized_candidate(mixer, point)


def selected_mixer(ctx: StageContext, before: str | None = None) -> MixerConfig:
    """The winner so far; the supernet's mixer in runs that select nothing."""
    stage = last_selection(ctx.config, before)
    if stage is None:
        return ctx.config.mixers[ctx.config.placement.linear]
    result: SelectionResult = ctx.result(stage)
    return type(ctx.config.mixers[result.winner_mixer]).parse(result.winner_config, f"winner of {stage}")


def winner_checkpoint(ctx: StageContext) -> Path:
    """Weights of the last selection stage's winner, for a stage 1 that continues them."""
    stage = last_selection(ctx.config)
    jobs = ctx.stage_dir(stage) / "jobs"
    steps = sorted((jobs / ctx.result(stage).winner / "checkpoints").glob("step-*/model"))
    if not steps:
        raise UserError(
            f"stage1.init=search: {stage} kept no weights of its winner (it was asked for afterwards, or an equal "
            f"candidate's result was reused); use stage1.init=teacher, or {stage}.keep_checkpoints=true from the start"
        )
    return steps[-1]


BLOCK_SELECTION = SelectionStage("block_selection", block_candidate, rank_by_accuracy)
NEW_BLOCK = SelectionStage("new_block", block_candidate, rank_by_accuracy)
HARDWARE_SEARCH = SelectionStage("hardware_search", grid_candidate, rank_within_throughput)
