"""Before a run starts: does it fit, on the disk and in the layout, and about how long will it take."""

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jet_launcher.provenance import gpus
from jet_launcher.run_directory import RunDirectory, list_runs
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate_text import format_bytes, format_seconds
from megatron_jet.configs.files import read_json
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.run_estimate import RunEstimate, StageEstimate, estimate_run, planned_student

# Dense bf16 TFLOP/s by a word in the GPU's name.
GPU_PEAKS = {"B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40": 181.0}
UNKNOWN_GPU_TFLOPS = 100.0
CPU_UTILISATION = 0.3  # small models reach about a third of a large matrix product
JOB_SECONDS = 2.0  # building models, scoring and checkpoints of one training job
START_SECONDS = 15.0  # importing torch and Megatron
OTHER_STAGE_SECONDS = {"prepare": 8.0, "export": 4.0, "evaluate": 20.0, "report": 5.0}
BASE_DISK_BYTES = 64 << 20  # prepared data of the tiny recipe, logs, TensorBoard files, report


@dataclass(frozen=True)
class Forecast:
    """What the chosen stages will need."""

    estimate: RunEstimate
    disk_bytes: int
    free_bytes: int
    seconds: float
    basis: str

    def line(self) -> str:
        """One line for the start of a run."""
        return (
            f"about {format_seconds(self.seconds)} ({self.basis}), up to {format_bytes(self.disk_bytes)} on disk "
            f"({format_bytes(self.free_bytes)} free)"
        )


def check_layout(config: RunConfig, teacher: ModelConfig) -> None:
    """Raise one UserError when teacher or student cannot be laid out, a batch does not divide, or sequences are longer
    than the teacher has positions."""
    student = planned_student(config, teacher)
    for stage in config.stages:
        settings = config.stage(stage)
        training = getattr(settings, "training", None)
        if training is None:
            continue
        if training.seq_length > teacher.max_position_embeddings:
            raise UserError(
                f"{stage}.training.seq_length={training.seq_length}: the teacher has "
                f"{teacher.max_position_embeddings} positions, beyond which it teaches nothing"
            )
        resources = settings.resources
        parallel = resources.parallel or config.parallel
        for model in (teacher, student):
            model.check_parallel(parallel.tensor, parallel.pipeline)
        if parallel.sequence_parallel and training.seq_length % parallel.tensor:
            raise UserError(
                f"{stage}: sequence_parallel shares training.seq_length={training.seq_length} out over "
                f"parallel.tensor={parallel.tensor} ranks, which does not divide it"
            )
        try:
            training.microbatches(parallel.data_parallel(resources.nodes * config.nproc))
        except UserError as error:
            raise UserError(f"{stage}: {error} (nproc={config.nproc}, nodes={resources.nodes})") from None


def forecast(
    config: RunConfig, teacher: ModelConfig, stages: tuple[str, ...], run: RunDirectory, root: Path
) -> Forecast:
    """Time and disk for `stages`.

    Time comes from the last finished run of the same recipe and size under `root` where there is one, else from FLOPs
    and the speed of this machine.
    """
    peak = device_tflops()
    estimate = estimate_run(config, teacher, peak_tflops=peak, utilisation=CPU_UTILISATION)
    by_name = {stage.stage: stage for stage in estimate.stages}
    earlier = measured_seconds(config, root)
    todo = [stage for stage in stages if not (run.stage(stage) / "result.json").is_file()]
    if todo and all(stage in earlier for stage in todo):
        seconds, basis = sum(earlier[stage] for stage in todo), "as in an earlier run"
    else:
        seconds = sum(_seconds(stage, by_name.get(stage)) for stage in todo) + (START_SECONDS if todo else 0.0)
        basis = "from FLOPs"
    return Forecast(estimate, disk_needed(estimate, todo), free_bytes(run.path), seconds, basis)


def disk_needed(estimate: RunEstimate, todo: Collection[str]) -> int:
    """Bytes that the stages of `todo` will take at most."""
    return BASE_DISK_BYTES + sum(stage.disk_bytes for stage in estimate.stages if stage.stage in todo) if todo else 0


def check_disk(expected: Forecast, run: RunDirectory) -> None:
    """Raise UserError when the disk is smaller than the forecast."""
    check_space(expected.disk_bytes, run)


def check_space(needed: int, run: RunDirectory) -> None:
    """Raise UserError when the disk of the run directory has less than `needed` bytes free, beside what the unfinished
    stages hold already."""
    free = free_bytes(run.path)
    began = run.path / "stages"
    there = sum(bytes_under(stage) for stage in began.glob("*") if not (stage / "result.json").is_file())
    if needed > free + there:
        # A run that has begun stays where it is.
        way = (
            "free some there (`clean` removes old checkpoints)" if began.is_dir() else "give an --output on another one"
        )
        size = format_bytes(needed - there) + (" more" if there else "")
        raise UserError(f"{run.path}: the run needs up to {size} but the disk has {format_bytes(free)} free; {way}")


def bytes_under(folder: Path) -> int:
    """Size of all files in a directory; those that vanish meanwhile count as nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size if path.is_file() and not path.is_symlink() else 0
    return total


def free_bytes(path: Path) -> int:
    """Free space of the disk that `path` is or will be on."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def measured_seconds(config: RunConfig, root: Path) -> dict[str, float]:
    """Seconds per stage of the newest run under `root` with the same recipe, processes and stage settings."""
    found: dict[str, float] = {}
    for run in list_runs(root):
        try:
            other = run.config()
        except UserError:
            continue  # a run of another version; its config no longer parses
        if (other.recipe, other.nproc) != (config.recipe, config.nproc):
            continue
        for path in run.path.glob("stages/*/result.json"):
            stage = path.parent.name
            if stage in (*OTHER_STAGE_SECONDS, *config.stages) and other.stage(stage) == config.stage(stage):
                seconds = read_json(path).get("measured", {}).get("seconds")
                if seconds is not None:
                    found[stage] = float(seconds)
    return found


def device_tflops() -> float:
    """Peak TFLOP/s of one GPU by its name, or a measured matrix product on one CPU core."""
    names = gpus()
    if names:
        return next((peak for word, peak in GPU_PEAKS.items() if word in names[0]), UNKNOWN_GPU_TFLOPS)
    return _cpu_tflops()


def _cpu_tflops(size: int = 384) -> float:
    import numpy  # a tenth of a second, which only a run pays

    matrix = numpy.ones((size, size), dtype=numpy.float32)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def _seconds(stage: str, estimate: StageEstimate | None) -> float:
    if estimate is None or not estimate.jobs:
        return OTHER_STAGE_SECONDS.get(stage, 0.0)
    return estimate.gpu_hours * 3600 / estimate.gpus + estimate.jobs * JOB_SECONDS
