"""What the stages of a run are doing, read from their status.json files."""

import os
import socket
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jet_launcher.run_directory import RunDirectory
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.configs.lock import LockHolder, lock_holder
from megatron_jet.configs.stages import STAGE_ORDER

PENDING, RUNNING, DONE, FAILED, INTERRUPTED = "pending", "running", "done", "failed", "interrupted"
KILLED = "killed"  # says running, but nobody is there any more


@dataclass(frozen=True)
class StageStatus:
    """One stage. Times are Unix seconds; losses are nats per token or as the stage names them.

    Attributes:
        phase: what the stage is working on, such as the candidate in training.
        first_step, first_step_at: where and when this phase began to count steps.
        seconds: working time up to the last update, over all attempts.
        error: one line that says why the stage is not running any more.
    """

    stage: str
    state: str = PENDING
    phase: str = ""
    step: int = 0
    total_steps: int = 0
    first_step: int = 0
    first_step_at: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    started: float | None = None
    updated: float | None = None
    seconds: float = 0.0
    pid: int | None = None
    host: str | None = None
    error: str | None = None

    @property
    def elapsed(self) -> float:
        """Seconds of work, over all attempts."""
        if self.state != RUNNING or self.updated is None:
            return self.seconds
        return self.seconds + max(0.0, time.time() - self.updated)

    @property
    def fraction(self) -> float:
        """Share of the work done, 0 to 1."""
        if self.state == DONE:
            return 1.0
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds that this phase takes on at its pace so far, or None when there is none yet."""
        if self.state != RUNNING or self.first_step_at is None or self.updated is None or self.step <= self.first_step:
            return None
        pace = max(0.0, self.updated - self.first_step_at) / (self.step - self.first_step)
        return max(0.0, pace * (self.total_steps - self.step) - (time.time() - self.updated))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for --json."""
        return {**self.__dict__, "fraction": self.fraction, "remaining": self.remaining}


def read_stage(run: RunDirectory, stage: str, holder: LockHolder | None) -> StageStatus:
    """Status of one stage; `holder` tells whether somebody works in the run directory."""
    status = read_status(run.stage(stage) / "status.json", stage)
    if status.state == RUNNING and holder is None and not _alive(status):
        return StageStatus(**{**status.__dict__, "state": KILLED})
    return status


def read_status(path: Path, name: str) -> StageStatus:
    """What a status.json says; `pending` when there is none."""
    if not path.is_file():
        return StageStatus(name)
    try:
        return StageStatus(**{**_fields(read_json(path)), "stage": name})
    except (UserError, TypeError, ValueError, AttributeError):
        # The file is replaced while we read, or a newer version writes it. Progress is not worth failing for.
        return StageStatus(name)


def _fields(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of StageStatus out of a status.json."""
    fields = {key: data[key] for key in StageStatus.__dataclass_fields__ if data.get(key) is not None}
    for key in ("started", "updated"):
        if key in fields:
            fields[key] = datetime.fromisoformat(fields[key]).timestamp()
    return {
        **fields,
        "phase": data.get("job") or "",
        "error": data.get("message"),
        "seconds": float(data.get("measured", {}).get("seconds", 0.0)),
    }


def read_run(run: RunDirectory, stages: tuple[str, ...] | None = None) -> list[StageStatus]:
    """Status of `stages`, by default those of the config and any other that has started, in order."""
    holder = lock_holder(run.lock_file)
    if stages is None:
        wanted = set(run.config().stages)
        stages = tuple(name for name in STAGE_ORDER if name in wanted or run.stage(name).is_dir())
    return [read_stage(run, stage, holder) for stage in stages]


def run_state(run: RunDirectory, statuses: list[StageStatus]) -> str:
    """One word for the whole run."""
    states = [status.state for status in statuses]
    if lock_holder(run.lock_file) is not None or RUNNING in states:
        return RUNNING
    for state in (FAILED, KILLED, INTERRUPTED):
        if state in states:
            return state
    if all(state == DONE for state in states):
        return DONE
    return "incomplete" if DONE in states else PENDING


def _alive(status: StageStatus) -> bool:
    if status.pid is None or status.host != socket.gethostname():
        return status.host is not None and status.host != socket.gethostname()
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
