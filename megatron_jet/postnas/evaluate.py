"""evaluate: teacher and export side by side, both as Hugging Face models on held-out data and on this device."""

from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_jet.configs.checksums import verify_export
from megatron_jet.configs.cost import ModelCost, model_cost
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.results import EvaluateResult, ExportResult, Measured, Scores, TrainStageResult
from megatron_jet.configs.teacher_source import resolve_teacher
from megatron_jet.configs.upstream import final_stage
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.evaluation.hf_scores import score_hf
from megatron_jet.evaluation.throughput.stages import measure_model
from megatron_jet.postnas.processes import on_main
from megatron_jet.postnas.scoring import eval_sets, score_checkpoint
from megatron_jet.postnas.stage import StageContext, common_inputs, persisted

CACHE_CONTEXTS = (4096, 65536, 262144)  # where the report states cache sizes, whatever was timed
# Nats per token by which export and Megatron model may differ in a loss. bf16 rounds the weights of an export and the
# activations of a run, and one of the two is enough: the export is scored in fp32.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


class EvaluateStage:
    """See the module's docstring."""

    name = "evaluate"
    kept = ()

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        return common_inputs(ctx, self.name, "prepare", final_stage(ctx.config), "export")

    def run(self, ctx: StageContext, inputs_hash: str) -> EvaluateResult:
        trained: TrainStageResult = ctx.result(final_stage(ctx.config))
        export: ExportResult = ctx.result("export")
        model = ModelConfig.parse(trained.model_config_, "final model")
        on_main(lambda: verify_export(ctx.path(export.path), export.files))
        ctx.status.phase("scoring the final model")
        megatron = persisted(
            ctx.stage_dir(self.name) / "megatron.json", Scores, lambda: self._megatron(ctx, model, trained)
        )
        final, final_measured = on_main(lambda: self._hf(ctx, str(ctx.path(export.path)), "final"))
        teacher, teacher_measured = on_main(lambda: self._hf(ctx, str(resolve_teacher(ctx.config.teacher)), "teacher"))
        check_equal(
            final, megatron, max(LOSS_TOLERANCE[dtype] for dtype in (ctx.config.dtype, ctx.config.export.dtype))
        )
        return EvaluateResult(
            stage=self.name,
            inputs_hash=inputs_hash,
            teacher=teacher,
            final=final,
            megatron=megatron,
            teacher_params=self._cost(ctx.teacher).total_params,
            final_params=self._cost(model).total_params,
            teacher_cache_bytes=self._cache_bytes(ctx, ctx.teacher),
            final_cache_bytes=self._cache_bytes(ctx, model),
            teacher_measured=teacher_measured,
            final_measured=final_measured,
            measured=Measured(seconds=ctx.status.seconds),
        )

    def _megatron(self, ctx: StageContext, model: ModelConfig, trained: TrainStageResult) -> Scores:
        evaluation = ctx.config.evaluate.eval
        return score_checkpoint(ctx, model, ctx.path(trained.checkpoint), ctx.data.heldout_split, evaluation)

    def _hf(self, ctx: StageContext, directory: str, name: str) -> tuple[Scores, Measured]:
        """Scores in fp32, then throughput in the run's own type. Rank 0 only."""
        settings = ctx.config.evaluate
        ctx.status.phase(f"scoring the {name} model")
        model = _on_device(load_for_causal_lm(directory, dtype=torch.float32))
        sets = eval_sets(ctx, ctx.data.heldout_split, settings.eval)
        scores = score_hf(model, sets, settings.eval.batch_size)
        ctx.status.phase(f"timing the {name} model")
        before = ctx.status.seconds
        if ctx.config.dtype == "bf16":
            model = model.to(torch.bfloat16)
        if not settings.throughput.timed:
            return scores, Measured(seconds=0.0)
        speed = measure_model(model, settings.throughput)
        measured = Measured(
            seconds=ctx.status.seconds - before,
            generation_tokens_per_second=speed.generation,
            prefill_tokens_per_second=speed.prefill,
            extra={"batch_size": speed.batch_size},
        )
        return scores, measured

    def _cache_bytes(self, ctx: StageContext, model: ModelConfig) -> dict[str, int]:
        contexts = sorted({*CACHE_CONTEXTS, *ctx.config.evaluate.throughput.contexts})
        return {str(context): model_cost(model, context).cache_bytes for context in contexts}

    def _cost(self, model: ModelConfig) -> ModelCost:
        return model_cost(model, context=1)


def check_equal(final: Scores, megatron: Scores, tolerance: float) -> None:
    """Raise RuntimeError when the export is not the model that was trained."""
    for name, loss in megatron.loss.items():
        if abs(final.loss[name] - loss) > tolerance * max(1.0, abs(loss)):
            raise RuntimeError(
                f"the export's loss on '{name}' is {final.loss[name]:.4f}, the Megatron model's {loss:.4f}; "
                "they must be equal, so the export is wrong"
            )


def _on_device(model: PreTrainedModel) -> PreTrainedModel:
    return model.to("cuda") if torch.cuda.is_available() else model


EVALUATE = EvaluateStage()
