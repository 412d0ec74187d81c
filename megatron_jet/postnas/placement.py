"""Placement: once-for-all supernet, heat map, beam search for the full-attention layers, then for the sliding windows.

Paper, section 2.2. Every layer of the supernet has the teacher's attention and a linear path; only the linear paths
train. Placements are scored straight from the supernet, and the one found is compared on held-out data with evenly
spaced ones, before and after a short training of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron_jet.configs.layer_plan import LayerPlan, hybrid_plan
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.placements import baselines, compared_placements
from megatron_jet.configs.results import ComparisonRow, Measured, PlacementResult, Scores
from megatron_jet.data.checks import check_objectives, sources_of
from megatron_jet.data.index import read_index
from megatron_jet.postnas.beam import Placement
from megatron_jet.postnas.jobs import Start, train_student
from megatron_jet.postnas.placement_search import PlacementSearch, ScorePlans, SearchOutcome
from megatron_jet.postnas.scoring import PlanScorer, ScoredPlans, check_eval_sets, plan_scorer, score_checkpoint
from megatron_jet.postnas.stage import StageContext, common_inputs, persisted
from megatron_jet.training.job import TrainResult
from megatron_jet.training.sampling import PathSampling


class PlacementStage:
    """See the module's docstring."""

    name = "placement"
    kept = ()

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        linear = ctx.config.placement.linear
        return common_inputs(ctx, self.name, "prepare") | {"mixer": ctx.config.mixers[linear].to_dict()}

    def run(self, ctx: StageContext, inputs_hash: str) -> PlacementResult:
        settings = ctx.config.placement
        self._check_data(ctx)
        supernet = self._train_supernet(ctx)
        found = self._search(ctx, supernet)
        before = self._held_out(ctx, supernet, found.full)
        rows, tokens = self._comparison(ctx, supernet, before)
        scores = found.scores
        return PlacementResult(
            stage=self.name,
            inputs_hash=inputs_hash,
            tokens=supernet.tokens + tokens,
            full=found.full,
            swa=found.swa,
            swa_window=settings.swa_window,
            plan=self._plan(ctx, found.full, found.swa),
            objective=settings.objective,
            swa_objective=settings.swa_objective,
            heat_map=found.heat_map,
            all_linear=scores.all_linear,
            all_full=scores.all_full,
            beam=found.beam,
            swa_beam=found.swa_beam,
            uniform=baselines(settings, ctx.teacher.num_layers)["uniform"],
            comparison=rows,
            layer_forwards=found.layer_forwards,
            layer_forwards_naive=found.layer_forwards_naive,
            final_losses=supernet.final_losses,
            measured=Measured(
                seconds=ctx.status.seconds,
                train_tokens_per_second=supernet.tokens_per_second,
                extra={"supernet_seconds": supernet.seconds},
            ),
        )

    def _check_data(self, ctx: StageContext) -> None:
        """Of what the search will be scored on, before the supernet is trained."""
        settings, data = ctx.config.placement, ctx.data
        check_objectives(settings, sources_of(read_index(data.path), data.search_split, data.path))
        for split in (data.search_split, data.heldout_split):
            check_eval_sets(ctx, split, settings.eval)

    def _train_supernet(self, ctx: StageContext) -> TrainResult:
        settings = ctx.config.placement
        layers = ctx.teacher.num_layers
        sampling = PathSampling(
            choices=(("attn", settings.linear),) * layers, full_layers=settings.full_layers, seed=ctx.config.seed
        )
        start = Start(init=settings.init)
        return train_student(
            ctx, self.name, "supernet", self._model(ctx), settings.training, start=start, sampling=sampling
        )

    def _search(self, ctx: StageContext, supernet: TrainResult) -> SearchOutcome:
        """Heat map and both beam searches on the search split; every round is kept on disk once scored."""
        ctx.status.phase("searching placements")
        with self._scorer(ctx, supernet, ctx.data.search_split) as score:
            search = PlacementSearch(
                settings=ctx.config.placement,
                num_layers=ctx.teacher.num_layers,
                directory=ctx.stage_dir(self.name) / "search",
                score=score,
            )
            return search.run()

    def _held_out(self, ctx: StageContext, supernet: TrainResult, learned: Placement) -> dict[str, ComparisonRow]:
        """Held-out scores straight from the supernet: the placement found, every even spacing, the two extremes."""
        layers = ctx.teacher.num_layers
        placements: dict[str, Placement] = {"learned": learned, **baselines(ctx.config.placement, layers)}
        placements["all_full"] = tuple(range(layers))
        ctx.status.phase("comparing placements on held-out data")
        plans = [self._plan(ctx, placement) for placement in placements.values()]
        with self._scorer(ctx, supernet, ctx.data.heldout_split) as score:
            path = ctx.stage_dir(self.name) / "search" / "held_out.json"
            scored = persisted(path, ScoredPlans, lambda: score(plans))
        return {
            name: ComparisonRow(name=name, full=placement, before=scores)
            for (name, placement), scores in zip(placements.items(), scored.scores)
        }

    def _comparison(
        self, ctx: StageContext, supernet: TrainResult, rows: dict[str, ComparisonRow]
    ) -> tuple[list[ComparisonRow], int]:
        """Train placements a little, with the same tokens in the same order, and score them again.

        Every uniform one by default: which of them the declared baseline is says much about how far it is behind.
        """
        tokens = 0
        after: dict[Placement, Scores] = {}
        for name in compared_placements(ctx.config.placement, ctx.teacher.num_layers):
            row = rows[name]
            if row.full not in after:
                after[row.full], spent = self._trained_scores(ctx, supernet, name, row.full)
                tokens += spent
            rows[name] = row.replace(after=after[row.full])
        return list(rows.values()), tokens

    def _trained_scores(
        self, ctx: StageContext, supernet: TrainResult, name: str, full: Placement
    ) -> tuple[Scores, int]:
        training = ctx.config.placement.compare_training
        name = name.replace(" ", "_")
        model = self._model(ctx, self._plan(ctx, full))
        start = Start(checkpoint=supernet.checkpoint, inside_supernet=True)
        trained = train_student(ctx, self.name, f"compare_{name}", model, training, start=start)
        scores = persisted(
            ctx.stage_dir(self.name) / "search" / f"after_{name}.json",
            Scores,
            lambda: score_checkpoint(ctx, model, trained.checkpoint, ctx.data.heldout_split, ctx.config.placement.eval),
        )
        return scores, trained.tokens

    @contextmanager
    def _scorer(self, ctx: StageContext, supernet: TrainResult, split: str) -> Iterator[ScorePlans]:
        """Scores plans with the trained supernet plus teacher attention with a window (a path without own weights).

        Loaded when first asked: a resumed stage may have every score already.
        """
        settings = ctx.config.placement
        choices = (("attn", settings.linear, f"swa:{settings.swa_window}"),) * ctx.teacher.num_layers
        with ExitStack() as stack:
            loaded: list[PlanScorer] = []

            def score(plans: Sequence[LayerPlan]) -> ScoredPlans:
                if not loaded:
                    scorer = plan_scorer(ctx, self._model(ctx), supernet.checkpoint, split, settings.eval, choices)
                    loaded.append(stack.enter_context(scorer))
                return loaded[0].score(plans)

            yield score

    def _model(self, ctx: StageContext, plan: LayerPlan | None = None) -> ModelConfig:
        linear = ctx.config.placement.linear
        return ctx.teacher.with_plan(plan or self._plan(ctx, ()), {linear: ctx.config.mixers[linear]})

    def _plan(self, ctx: StageContext, full: Placement, swa: Placement = ()) -> LayerPlan:
        settings = ctx.config.placement
        return hybrid_plan(ctx.teacher.num_layers, settings.linear, full, dict.fromkeys(swa, settings.swa_window))


PLACEMENT = PlacementStage()
