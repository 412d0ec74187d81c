"""status.json of a running stage: what the launcher shows while it waits."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_jet.configs.files import read_json, write_json

WRITE_EVERY = 1.0  # seconds; a file per training step would cost more than a small step


@dataclass
class StageStatus:
    """Writes status.json atomically and not too often. Without a path it keeps quiet (ranks above 0, tests)."""

    path: Path | None = None
    seconds_before: float = 0.0

    def __post_init__(self):
        self._row: dict[str, Any] = {}
        self._start = time.monotonic()
        self._written = 0.0

    def begin(self) -> None:
        """Mark the stage running; seconds of interrupted attempts before this one are carried on."""
        if self.path is not None and self.path.is_file():
            self.seconds_before = float(read_json(self.path).get("measured", {}).get("seconds", 0.0))
        self._row = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        self._write("running")

    def update(self, **fields: Any) -> None:
        """Progress: step, total_steps, losses, job (what is worked on)."""
        self._row.update(fields)
        if time.monotonic() - self._written >= WRITE_EVERY:
            self._write("running")

    def end(self, state: str, message: str | None = None) -> None:
        """`done`, `failed` or `interrupted`, with one line that says why."""
        if message is not None:
            self._row["message"] = message
        self._write(state)

    def _write(self, state: str) -> None:
        self._written = time.monotonic()
        if self.path is None:
            return
        seconds = self.seconds_before + time.monotonic() - self._start
        write_json(self.path, {"state": state, **self._row, "updated": _now(), "measured": {"seconds": seconds}})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
