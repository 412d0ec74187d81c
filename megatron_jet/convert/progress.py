"""What a user sees while a checkpoint is converted: bytes done, speed and time left."""

import sys
import time
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

MIB = 2**20


class Made(Protocol):
    """A tensor made when it is written: LazyTensor, OutTensor."""

    bytes: int


Tensor_ = TypeVar("Tensor_", bound=Made)


class ConversionProgress:
    """A bar on a terminal; elsewhere a line now and then. On stderr. Use it as a context manager.

    Args:
        line_seconds: time between plain lines, so that a short conversion says nothing.
    """

    def __init__(self, *, line_seconds: float = 10.0):
        self.done = self.total = 0
        self.line_seconds = line_seconds
        self.started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def watched(self, tensor: Tensor_) -> Tensor_:
        """The same tensor, counted when it is made. All must be announced before the first is made."""
        self.total += tensor.bytes
        make = tensor.make

        def counted():
            made = make()
            self._count(tensor.bytes)
            return made

        return replace(tensor, make=counted)

    def summary(self) -> str:
        """Size, time and speed so far, for the last line of a command."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return f"{self.done / MIB:,.1f} MiB in {seconds:.1f} s, {self.done / MIB / seconds:,.0f} MiB/s"

    def _count(self, number: int) -> None:
        self.done += number
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total)
            return
        now = time.monotonic()
        if now - self._last_line >= self.line_seconds:
            self._last_line = now
            left = (now - self.started) * (self.total - self.done) / max(self.done, 1)
            print(f"{self.done / MIB:,.0f} of {self.total / MIB:,.0f} MiB, {left:.0f} s left", file=sys.stderr)
