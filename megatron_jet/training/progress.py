"""What a user sees while a model trains: a bar with time left on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainingProgress:
    """Shown by rank 0, on stderr.

    Args:
        name: of the job.
        total_steps: of the job.
        done: steps that an earlier process did.
        line_seconds: time between plain lines.
    """

    def __init__(self, name: str, total_steps: int, done: int, *, line_seconds: float = 15.0):
        self.name, self.total_steps = name, total_steps
        self.done = self.first = done
        self.line_seconds = line_seconds
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()

    def start(self) -> None:
        """Open the bar where there is a terminal."""
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.name, total=self.total_steps, completed=self.done, figures="")
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, losses: dict[str, float], tokens_per_second: float) -> None:
        """Show a finished step."""
        self.done = done
        figures = "  ".join(f"{key} {value:.4f}" for key, value in losses.items() if value)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=f"{figures}  {tokens_per_second:,.0f} tok/s")
            return
        now = time.monotonic()
        if done == self.total_steps or now - self._last_line >= self.line_seconds:
            self._last_line = now
            self.say(f"step {done}/{self.total_steps}  {figures}  {tokens_per_second:,.0f} tok/s  {self._left(now)}")

    def say(self, text: str) -> None:
        """One line of news, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(f"{self.name}: {text}", highlight=False, markup=False)
        else:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        if self.done >= self.total_steps:
            return "done"
        per_step = (now - self._started) / max(1, self.done - self.first)
        seconds = int(per_step * (self.total_steps - self.done))
        return f"{seconds // 60}:{seconds % 60:02d} left"
