"""status.json of a running stage or candidate: what the launcher shows while it waits."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from megatron_jet.configs.attempts import leave_if_superseded
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import measured_seconds, read_json_object, remove, write_json

WRITE_EVERY = 1.0  # seconds; a file per training step would cost more than a small step
LOSSES = ("loss", "feature", "kl", "cross_entropy")

State = Literal["running", "done", "failed", "interrupted"]


@dataclass
class StageStatus:
    """Writes status.json atomically and not too often. Without a path it keeps quiet (ranks above 0).

    Attributes:
        path: the file.
        seconds_before: that earlier, interrupted attempts took.
    """

    path: Path | None = None
    seconds_before: float = 0.0

    def __post_init__(self):
        self._row: dict[str, Any] = {}
        self._start = time.monotonic()
        self._written = 0.0

    def begin(self) -> None:
        """Mark as running. Seconds of interrupted attempts are carried on."""
        if self.path is not None:
            self.seconds_before = _seconds_of(self.path)
            if self.path.is_dir():
                remove(self.path)
        self._row = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        self._write("running")

    def phase(self, text: str) -> None:
        """What is done now, for example "training gla"."""
        for key in ("step", "total_steps", "losses", "tokens_per_second", "first_step", "first_step_at"):
            self._row.pop(key, None)
        self._row["job"] = text
        self._write("running")

    def observe(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl: the trainer's observer."""
        if row["split"] != "train":
            return
        self._row |= {key: row[key] for key in ("step", "total_steps", "tokens_per_second") if key in row}
        self._row["losses"] = {key: row[key] for key in LOSSES if key in row}
        # The time left comes from the pace since then; a resumed phase does not start at step 0.
        self._row.setdefault("first_step", row["step"])
        self._row.setdefault("first_step_at", time.time())
        if time.monotonic() - self._written >= WRITE_EVERY:
            self._write("running")

    def end(self, state: State, error: str | None = None) -> None:
        """`done`, `failed` or `interrupted`, with one line that says why."""
        if error is not None:
            self._row["message"] = error
        self._row["finished"] = _now()
        self._write(state)

    @property
    def seconds(self) -> float:
        """Spent so far, over all attempts."""
        return self.seconds_before + time.monotonic() - self._start

    def _write(self, state: State) -> None:
        self._written = time.monotonic()
        if self.path is not None:
            leave_if_superseded()
            row = {"state": state, **self._row, "updated": _now(), "measured": {"seconds": self.seconds}}
            write_json(self.path, row)


def _seconds_of(path: Path) -> float:
    """Seconds of the attempts before, as far as the file tells: what a user does to it is not worth failing for."""
    try:
        return measured_seconds(read_json_object(path)) or 0.0
    except UserError:
        return 0.0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
