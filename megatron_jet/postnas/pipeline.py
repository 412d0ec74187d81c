"""Run one stage: skip it when it is finished, resume it when it was cut off, start over when its inputs changed."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_jet.configs.attempts import SupersededError
from megatron_jet.configs.candidates import candidate_names
from megatron_jet.configs.checksums import DamagedError
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import (
    hash_json,
    read_json_object,
    read_written,
    remove,
    write_json,
)
from megatron_jet.configs.results import CandidateResult, StageResult, result_type
from megatron_jet.configs.signals import Interrupted, StopRequest, interruptible
from megatron_jet.postnas.catalog import stage_named
from megatron_jet.postnas.processes import on_main, rank
from megatron_jet.postnas.stage import Stage, StageContext, clear_directory, write_result
from megatron_jet.postnas.status import StageStatus

log = logging.getLogger(__name__)

SHOWN_CHANGES = 5


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
        on_main(lambda: write_result(directory / "result.json", result))
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
    """The stage's result if it has one that belongs to these inputs. One that was changed since, or that another
    version wrote, does not count: a line says so, and the stage is done again."""
    path = directory / "result.json"
    if not os.path.lexists(path):
        return None
    try:
        result = result_type(name).parse(read_written(path), str(path))
    except UserError as error:
        log.warning("%s; stage '%s' is done again", error, name)
        return None
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
        _open_directory(directory, stage, inputs, digest)
    return digest, finished


def _open_directory(directory: Path, stage: Stage, inputs: dict[str, Any], digest: str) -> None:
    """Keep unfinished work that belongs to these inputs; drop everything else, and say why."""
    record = directory / "inputs.json"
    changes = _changes(record, inputs, digest)
    if changes is not None:
        log.warning("stage '%s' starts over: %s", stage.name, changes)
        clear_directory(directory, keep=("log.txt", *stage.kept))
    remove(directory / "result.json")
    write_json(record, {"hash": digest, "inputs": inputs} | ({} if changes is None else {"started_over": changes}))


def _changes(record: Path, inputs: dict[str, Any], digest: str) -> str | None:
    """Why work recorded in inputs.json does not belong to these inputs; None when it does, or there is none."""
    if not os.path.lexists(record):
        return None
    try:
        stored = read_json_object(record)
    except UserError as error:
        return str(error)
    if stored.get("hash") == digest:
        return None
    keys = differing_keys(stored.get("inputs"), json.loads(json.dumps(inputs)))
    shown = ", ".join(keys[:SHOWN_CHANGES]) + (" ..." if len(keys) > SHOWN_CHANGES else "")
    return f"its inputs have changed ({shown})" if keys else f"{record} is not what was written"


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(key for key in old if key not in new)]
        found = [differing_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key) for key in names]
        return [name for part in found for name in part]
    return [] if old == new else [prefix or "all of them"]


def _with_status[R](ctx: StageContext, directory: Path, work: Callable[[StageContext], R]) -> R:
    """Do some work with a status.json beside it that says how it goes and how it ended."""
    status = _status_file(directory)
    try:
        with interruptible():
            status.begin()
            result = work(StageContext(ctx.run_dir, ctx.config, status))
    except SupersededError:
        raise  # the status is the other attempt's
    except (Interrupted, KeyboardInterrupt) as error:
        with StopRequest():
            status.end("interrupted", str(error) or "interrupted")
        raise
    except DamagedError as error:
        advised = UserError(f"{error}; {_repair(ctx, directory, error.path)}")
        status.end("failed", str(advised))
        raise advised from None
    except BaseException as error:
        status.end("failed", describe(error))
        raise
    with StopRequest():  # a request from here on is handed on when the status is written: the next stage does not start
        status.end("done")
    return result


def _repair(ctx: StageContext, directory: Path, damaged: Path | None) -> str:
    """How to get a damaged checkpoint made anew, by where it lies."""
    inside = damaged.relative_to(ctx.run_dir).parts if damaged and damaged.is_relative_to(ctx.run_dir) else ()
    outputs = {"prepared": "prepare", "export": "export"}
    stage = inside[1] if inside[:1] == ("stages",) else outputs.get(inside[0]) if inside else None
    if stage is None:
        return "give an undamaged copy"
    if ctx.stage_dir(stage) == directory:
        return "run again, which makes it anew"
    return f"delete {ctx.stage_dir(stage) / 'result.json'} and run again, which makes it anew"


def _status_file(directory: Path) -> StageStatus:
    return StageStatus(directory / "status.json" if rank() == 0 else None)
