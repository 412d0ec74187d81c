"""Run one stage: skip it when it is finished, resume it when it was cut off, start over when its inputs changed."""

import shutil
from pathlib import Path
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_json, read_json, write_json
from megatron_jet.configs.results import RESULT_TYPES, StageResult
from megatron_jet.postnas.catalog import stage_named
from megatron_jet.postnas.processes import interruptible, on_main, rank
from megatron_jet.postnas.stage import StageContext
from megatron_jet.postnas.status import StageStatus
from megatron_jet.training.signals import Interrupted

KEPT_WHEN_CLEARED = ("log.txt",)


def run_stage(ctx: StageContext, name: str) -> StageResult:
    """Bring one stage to its end. Collective over all ranks.

    Args:
        ctx: run directory and config; its status is replaced by one for this stage.
        name: of the stage.

    Returns:
        The result, from this run or from the one that finished it.

    Raises:
        UserError: unknown stage, or a stage it needs has not finished.
        Interrupted: stopped by a signal; running again goes on from there.
    """
    stage = stage_named(name)
    directory = ctx.stage_dir(name)
    inputs = on_main(lambda: stage.inputs(ctx))
    digest = hash_json(inputs)
    finished = on_main(lambda: finished_result(directory, name, digest))
    if finished is not None:
        return finished
    status = StageStatus(directory / "status.json" if rank() == 0 else None)
    ctx = StageContext(ctx.run_dir, ctx.config, status)
    on_main(lambda: _open_directory(directory, inputs, digest))
    status.begin()
    try:
        with interruptible():
            result = stage.run(ctx, digest)
        on_main(lambda: write_json(directory / "result.json", result.to_dict()))
    except (Interrupted, KeyboardInterrupt) as error:
        status.end("interrupted", str(error) or "interrupted")
        raise
    except BaseException as error:
        status.end("failed", describe(error))
        raise
    status.end("done")
    return result


def finished_result(directory: Path, name: str, digest: str) -> StageResult | None:
    """The stage's result if it has one that belongs to these inputs."""
    path = directory / "result.json"
    if not path.is_file():
        return None
    try:
        result = RESULT_TYPES[name].parse(read_json(path), str(path))
    except UserError:
        return None  # written by another version: do the stage again
    return result if result.inputs_hash == digest else None


def describe(error: BaseException) -> str:
    """One line for an error."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"[:500]


def _open_directory(directory: Path, inputs: dict[str, Any], digest: str) -> None:
    """Keep unfinished work that belongs to these inputs; drop everything else, and what a kill left half-written."""
    record = directory / "inputs.json"
    if record.is_file() and read_json(record).get("hash") != digest:
        for entry in directory.iterdir():
            if entry.name not in KEPT_WHEN_CLEARED:
                _remove(entry)
    (directory / "result.json").unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in list(directory.rglob(".*")):
        if leftover.name != ".metadata":
            _remove(leftover)
    write_json(record, {"hash": digest, "inputs": inputs})


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
