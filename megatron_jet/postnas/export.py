"""export: the final model as a Hugging Face directory that loads by itself, compared with the Megatron model."""

import shlex
from pathlib import Path
from typing import Any

import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file
from megatron_jet.configs.hf_format import hf_model_type
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.provenance import read_provenance
from megatron_jet.configs.results import ExportResult, Measured, TrainStageResult
from megatron_jet.configs.stages import EvalConfig
from megatron_jet.configs.teacher_source import tokenizer_directory
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.configs.upstream import final_stage
from megatron_jet.convert.hf_export import export_hf
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.convert.model_card import model_card
from megatron_jet.model.builder import build_model
from megatron_jet.model.stepwise import run_all
from megatron_jet.postnas.processes import on_main
from megatron_jet.postnas.scoring import eval_sets
from megatron_jet.postnas.stage import StageContext, common_inputs
from megatron_jet.training.checkpoint import load_model
from megatron_jet.training.parallel import parallel_session

LAUNCHER = "postnas.py"
FOLDER = "export"  # folder in the run directory
COMPARED_SEQUENCES = 4  # of each held-out set


class ExportStage:
    """See the module's docstring."""

    name = "export"
    kept = ()

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        return common_inputs(ctx, self.name, "prepare", final_stage(ctx.config))

    def run(self, ctx: StageContext, inputs_hash: str) -> ExportResult:
        trained: TrainStageResult = ctx.result(final_stage(ctx.config))
        model = ModelConfig.parse(trained.model_config_, "final model")
        checkpoint, out = ctx.path(trained.checkpoint), ctx.run_dir / FOLDER
        ctx.status.phase("writing the Hugging Face directory")
        on_main(lambda: self._write(ctx, checkpoint, out, trained))
        ctx.status.phase("comparing logits with the Megatron model")
        difference = self._max_logit_difference(ctx, model, checkpoint, out)
        files = on_main(lambda: {path.name: hash_file(path) for path in sorted(out.iterdir())})
        return ExportResult(
            stage=self.name,
            inputs_hash=inputs_hash,
            path=ctx.relative(out),
            model_type=hf_model_type(model),
            files=files,
            max_logit_difference=difference,
            measured=Measured(seconds=ctx.status.seconds),
        )

    def _write(self, ctx: StageContext, checkpoint: Path, out: Path, trained: TrainStageResult) -> None:
        settings = ctx.config.export
        model = ModelConfig.parse(trained.model_config_, "final model")
        card = model_card(
            model,
            command=launch_command(ctx),
            teacher=ctx.config.teacher.path,
            recipe=ctx.config.recipe,
            placement=ctx.result("placement") if ctx.config.student_plan is None else None,
            scores=trained.after,
            scored_on=scored_on(ctx, trained),
        )
        export_hf(
            checkpoint,
            out,
            dtype=settings.dtype,
            shard_bytes=settings.shard_bytes,
            force=True,
            companions=tokenizer_directory(ctx.config.teacher),
            card=card,
        )

    def _max_logit_difference(self, ctx: StageContext, model: ModelConfig, checkpoint: Path, out: Path) -> float:
        """Largest absolute difference over some held-out sequences. Both models run in fp32, so that what differs is
        the code, and the rounding of the exported weights when they are bf16."""
        sets = eval_sets(ctx, ctx.data.heldout_split, EvalConfig(samples=COMPARED_SEQUENCES))
        layout = ParallelConfig()
        with parallel_session(layout, ctx.config.seed):
            chunks = build_model(model, layout, dtype="fp32", init_seed=None)
            load_model(chunks, checkpoint)
            chunks[0].eval()
            device = next(chunks[0].parameters()).device
            ours = [run_all(chunks[0], evalset.tokens.to(device)).cpu() for evalset in sets]

            def compare() -> float:
                exported = load_for_causal_lm(out, dtype=torch.float32).to(device)
                with torch.no_grad():
                    theirs = [exported(input_ids=evalset.tokens.to(device), use_cache=False).logits for evalset in sets]
                return max(float((a - b.cpu()).abs().max()) for a, b in zip(ours, theirs))

            return on_main(compare)


def scored_on(ctx: StageContext, trained: TrainStageResult) -> str:
    """The data of the card's scores, which are older than those of the evaluate stage and of fewer sequences."""
    samples = ctx.config.stage(trained.stage).eval.samples
    return (
        f"the split `{ctx.data.heldout_split}`, at most {samples} sequences of each set, taken at the end of "
        f"{trained.stage} (the run's report has those of its evaluate stage)"
    )


def launch_command(ctx: StageContext) -> str:
    """What the run was started with, less where its output went: equal runs make equal cards wherever they lie."""
    try:
        launches = read_provenance(ctx.run_dir / "provenance.json")["launches"]
        words = shlex.split(launches[0].get("command", "")) if launches else []
    except (UserError, ValueError):
        words = []  # a record that somebody wrote into; the card names the recipe then
    start = next((i for i, word in enumerate(words) if word.endswith(LAUNCHER)), None)
    if start is None:
        return f"python launcher/{LAUNCHER} run {ctx.config.recipe}"
    rest = words[start + 1 :]
    if "--output" in rest:
        at = rest.index("--output")
        del rest[at : at + 2]
    return shlex.join(["python", f"launcher/{LAUNCHER}", *(word for word in rest if not word.startswith("--output="))])


EXPORT = ExportStage()
