"""Showing and following the log files of a run."""

import time
from pathlib import Path
from typing import TextIO

from jet_launcher.run_directory import RunDirectory
from jet_launcher.stage_status import PENDING, read_run
from jet_launcher.usage import usage_errors
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.lock import lock_holder

POLL_SECONDS = 0.3


def log_path(run: RunDirectory, stage: str | None) -> Path:
    """Log of `stage`, by default of the stage that ran last.

    Raises:
        UserError: the stage is unknown or has no log yet.
    """
    if stage is not None:
        config = run.config()
        with usage_errors():
            config.stage(stage)
        path = run.stage(stage) / "log.txt"
        if not path.is_file():
            raise UserError(f"{stage} of {run.id} has no log yet ({path})")
        return path
    started = [s for s in read_run(run) if s.state != PENDING and (run.stage(s.stage) / "log.txt").is_file()]
    # A full disk lets logs begin and takes no line.
    started = [s for s in started if (run.stage(s.stage) / "log.txt").stat().st_size] or started
    if started:
        latest = max(started, key=lambda status: status.updated or 0.0)
        return run.stage(latest.stage) / "log.txt"
    if run.log_file.is_file():
        return run.log_file
    raise UserError(f"{run.id} has no log yet; start it with `run` or `resume`")


def show_log(run: RunDirectory, stage: str | None, follow: bool, stream: TextIO) -> None:
    """Copy a log to `stream`. With `follow`, go on until nobody works in the run directory, through all stages when
    no stage was named."""
    path = log_path(run, stage)
    position = _copy(path, 0, stream)
    while follow:
        over = lock_holder(run.lock_file) is None  # asked first: what was written until then is shown
        if not over:
            time.sleep(POLL_SECONDS)
        position = _copy(path, position, stream)
        latest = path if stage is not None else log_path(run, None)
        if latest != path:
            path, position = latest, _copy(latest, 0, stream)
        if over:
            return
    _copy(path, position, stream)


def _copy(path: Path, position: int, stream: TextIO) -> int:
    with open(path, "rb") as log:
        log.seek(position)
        data = log.read()
    stream.write(data.decode(errors="replace"))
    stream.flush()
    return position + len(data)
