"""What a user sees while data are prepared: bytes read, tokens per second and time left."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Done:
    """How far the work is.

    Attributes:
        read, total: bytes of the input files, as they are on disk.
        tokens: written.
    """

    read: int
    total: int
    tokens: int


Watch = Callable[[Done], None]  # is told after every sample


class PreparationProgress:
    """A bar on a terminal; elsewhere a line now and then. On stderr. Use it as a context manager.

    Args:
        line_seconds: time between plain lines, so that a short run says nothing.
    """

    def __init__(self, *, line_seconds: float = 30.0):
        self.line_seconds = line_seconds
        self.done = Done(0, 0, 0)
        self._started = self._last = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (BarColumn(), DownloadColumn(binary_units=True), TextColumn("{task.fields[speed]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None, speed="")
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """One line of news, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def update(self, done: Done) -> None:
        """Show how far the work is."""
        self.done = done
        now = time.monotonic()
        if now - self._last < (0.2 if self._bar is not None else self.line_seconds):
            return
        self._last = now
        if self._bar is not None:
            self._bar.update(self._task, completed=done.read, total=done.total, speed=f"{self._speed(now):,.0f} tok/s")
            return
        seconds = (now - self._started) * (done.total - done.read) / max(done.read, 1)
        left = timedelta(seconds=round(seconds))
        self.say(f"{size(done.read)} of {size(done.total)}, {self._speed(now):,.0f} tokens/s, {left} left")

    def summary(self) -> str:
        """The totals, for the last line of a command."""
        now = time.monotonic()
        took = timedelta(seconds=round(now - self._started))
        of = f" of {size(self.done.total)}" if self.done.total else ""  # synthetic samples come from no file
        return f"{self.done.tokens:,} tokens{of} in {took}, {self._speed(now):,.0f} tokens/s"

    def _speed(self, now: float) -> float:
        return self.done.tokens / max(now - self._started, 1e-9)


def size(count: int) -> str:
    """A number of bytes in words: "512 bytes", "1.5 GiB"."""
    unit = 0
    while count >= 1024 ** (unit + 1) and unit + 1 < len(UNITS):
        unit += 1
    return f"{count / 1024**unit:,.1f} {UNITS[unit]}" if unit else f"{count} bytes"
