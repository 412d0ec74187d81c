"""One training job inside a stage: first weights, training, final checkpoint, cleaning up."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.checksums import verify
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import TrainingConfig
from megatron_jet.convert.student import Init, extract_student, make_student
from megatron_jet.model.paths import Choices
from megatron_jet.postnas.processes import on_main
from megatron_jet.postnas.stage import StageContext
from megatron_jet.training.checkpoint import check_complete
from megatron_jet.training.job import TrainJob, TrainResult
from megatron_jet.training.parallel import parallel_session
from megatron_jet.training.sampling import PathSampling
from megatron_jet.training.trainer import train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a student's first weights come from: the teacher, by each mixer's rule or at random for the linear ones; or
    a finished checkpoint; or, with `inside_supernet`, one path per layer of a supernet's checkpoint."""

    init: Init = "teacher"
    checkpoint: Path | None = None
    inside_supernet: bool = False


def train_student(
    ctx: StageContext,
    stage: str,
    name: str,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    start: Start,
    sampling: PathSampling | None = None,
) -> TrainResult:
    """Train one student, or take the result of a run that finished it. Collective.

    Args:
        ctx: the running stage's.
        stage: its name; decides the layout.
        name: of the job; its files lie in stages/<stage>/jobs/<name>.
        model: the student.
        training: steps, losses and so on.
        start: first weights.
        sampling: for a supernet.

    Raises:
        Interrupted: stopped by a signal, after saving.
        UserError: training failed; see `train`.
    """
    parallel = ctx.layout(stage)
    job = TrainJob(
        name=f"{stage}/{name}",
        model=model,
        init=_first_weights_path(ctx, stage, name, start),
        training=training,
        parallel=parallel,
        dtype=ctx.config.dtype,
        data=ctx.training_data(stage),
        seed=ctx.config.seed,
        out=job_dir(ctx, stage, name),
        teacher=ctx.teacher,
        teacher_checkpoint=ctx.teacher_checkpoint,
        sampling=sampling,
    )
    ctx.status.phase(f"training {name}")
    if on_main(lambda: TrainResult.load(job)) is None:
        first_weights(ctx, stage, name, model, start, sampling.choices if sampling is not None else None)
    with parallel_session(parallel, ctx.config.seed):
        result = train(job, ctx.status.observe)
    on_main(lambda: _clean(job, result))
    return result


def first_weights(
    ctx: StageContext, stage: str, name: str, model: ModelConfig, start: Start, choices: Choices | None = None
) -> Path:
    """Checkpoint that a job starts from, written unless it is there. Collective."""
    path = _first_weights_path(ctx, stage, name, start)
    if path != start.checkpoint:
        on_main(lambda: _write_first_weights(ctx, path, model, start, choices))
    return path


def job_dir(ctx: StageContext, stage: str, name: str) -> Path:
    """Directory of one training job of a stage."""
    return ctx.stage_dir(stage) / "jobs" / name


def remove_checkpoints(ctx: StageContext, stage: str, name: str) -> None:
    """Delete a scored job's weights; its metrics stay. Rank 0 only."""
    shutil.rmtree(job_dir(ctx, stage, name) / "checkpoints", ignore_errors=True)


def _first_weights_path(ctx: StageContext, stage: str, name: str, start: Start) -> Path:
    if start.checkpoint is not None and not start.inside_supernet:
        return start.checkpoint
    return job_dir(ctx, stage, name) / "init"


def _write_first_weights(
    ctx: StageContext, path: Path, model: ModelConfig, start: Start, choices: Choices | None
) -> None:
    """Rank 0 only."""
    if path.exists():
        try:
            check_complete(path)
            verify(path)
            return
        except UserError as error:
            log.warning("%s; made again", error)
    if start.inside_supernet:
        extract_student(start.checkpoint, model, path)
        return
    make_student(
        ctx.teacher_checkpoint, ctx.teacher, model, path, seed=ctx.config.seed, init=start.init, choices=choices
    )


def _clean(job: TrainJob, result: TrainResult) -> None:
    """Keep final and best weights; first weights, optimiser state and older checkpoints are not needed any more."""
    kept = {result.checkpoint, result.best_checkpoint} - {None}
    shutil.rmtree(job.out / "init", ignore_errors=True)
    for directory in (job.out / "checkpoints").iterdir():
        if directory / "model" in kept:
            shutil.rmtree(directory / "state", ignore_errors=True)
        elif directory not in kept:
            shutil.rmtree(directory, ignore_errors=True)
