"""Run one stage: skip it when it is finished, resume it when it was cut off, start over when its inputs changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_jet.configs.candidates import candidate_names
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_json, read_json, write_json
from megatron_jet.configs.results import CandidateResult, StageResult, result_type
from megatron_jet.configs.signals import Interrupted, StopRequest, interruptible
from megatron_jet.postnas.catalog import stage_named
from megatron_jet.postnas.processes import on_main, rank
from megatron_jet.postnas.stage import Stage, StageContext, clear_directory
from megatron_jet.postnas.status import StageStatus


def run_stage(ctx: StageContext, name: str) -> StageResult:
    """Bring one stage to its end. Collective over all ranks.

    Args:
        ctx: run directory and config.
        name: of the stage.

    Returns:
        The result, from this run or from the one that finished it.

    Raises:
        UserError: unknown stage, or a stage it needs has not finished.
        Interrupted: stopped by a signal; running again goes on from there.
    """
    stage = stage_named(name)
    directory = ctx.stage_dir(name)

    def work(own: StageContext) -> StageResult:
        result = stage.run(own, digest)
        on_main(lambda: write_json(directory / "result.json", result.to_dict()))
        return result

    try:
        digest, finished = on_main(lambda: _look_up(ctx, stage, directory))
    except UserError as error:  # the launcher shows the reason from here: a stage it needs is missing, say
        status = _status_file(directory)
        status.begin()
        status.end("failed", describe(error))
        raise
    return finished if finished is not None else _with_status(ctx, directory, work)


def run_candidate(ctx: StageContext, stage_name: str, name: str) -> CandidateResult:
    """Train and score one candidate of a selection stage. Others of the same stage may run elsewhere meanwhile.

    The stage itself, run afterwards, finds the result and ranks.

    Raises:
        UserError: the stage has no such candidate.
    """
    stage = stage_named(stage_name)
    known = candidate_names(ctx.config, stage_name)
    if name not in known:
        raise UserError(f"stage '{stage_name}' has no candidate '{name}'; known: {', '.join(known) or 'none'}")
    directory = ctx.stage_dir(stage_name) / "jobs" / name
    return _with_status(ctx, directory, lambda own: stage.run_candidate(own, name))


def finished_result(directory: Path, name: str, digest: str) -> StageResult | None:
    """The stage's result if it has one that belongs to these inputs."""
    path = directory / "result.json"
    if not path.is_file():
        return None
    try:
        result = result_type(name).parse(read_json(path), str(path))
    except UserError:
        return None  # written by another version: do the stage again
    return result if result.inputs_hash == digest else None


def describe(error: BaseException) -> str:
    """One line for an error."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"[:500]


def _look_up(ctx: StageContext, stage: Stage, directory: Path) -> tuple[str, StageResult | None]:
    """Hash of the inputs, and the finished result; without one the directory is made ready. Rank 0 only."""
    inputs = stage.inputs(ctx)
    digest = hash_json(inputs)
    finished = finished_result(directory, stage.name, digest)
    if finished is None:
        _open_directory(directory, inputs, digest, stage.kept)
    return digest, finished


def _open_directory(directory: Path, inputs: dict[str, Any], digest: str, kept: tuple[str, ...]) -> None:
    """Keep unfinished work that belongs to these inputs; drop everything else."""
    record = directory / "inputs.json"
    if record.is_file() and read_json(record).get("hash") != digest:
        clear_directory(directory, keep=("log.txt", *kept))
    (directory / "result.json").unlink(missing_ok=True)
    write_json(record, {"hash": digest, "inputs": inputs})


def _with_status[R](ctx: StageContext, directory: Path, work: Callable[[StageContext], R]) -> R:
    """Do some work with a status.json beside it that says how it goes and how it ended."""
    status = _status_file(directory)
    try:
        with interruptible():
            status.begin()
            result = work(StageContext(ctx.run_dir, ctx.config, status))
    except (Interrupted, KeyboardInterrupt) as error:
        with StopRequest():
            status.end("interrupted", str(error) or "interrupted")
        raise
    except BaseException as error:
        status.end("failed", describe(error))
        raise
    with StopRequest():  # a request from here on is handed on when the status is written: the next stage does not start
        status.end("done")
    return result


def _status_file(directory: Path) -> StageStatus:
    return StageStatus(directory / "status.json" if rank() == 0 else None)
