"""What a waiting user sees: a rich display on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Protocol, TextIO

from jet_launcher import stage_status as states
from jet_launcher.stage_status import StageStatus
from megatron_jet.configs.estimate_text import format_seconds

PLAIN_INTERVAL = 10.0  # seconds between two lines about the same phase
PLAIN_SILENCE = 60.0  # when there is nothing new to say
_MARKS = {
    states.PENDING: ("·", "dim"),
    states.RUNNING: ("▸", "bold cyan"),
    states.DONE: ("✓", "green"),
    states.FAILED: ("✗", "bold red"),
    states.INTERRUPTED: ("‖", "yellow"),
    states.KILLED: ("✗", "bold red"),
}


class Display(Protocol):
    """Shows the stages of a run. `update` is called a few times per second."""

    def update(self, statuses: list[StageStatus]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_display(stream: TextIO | None = None) -> Display:
    """RichDisplay when `stream` (by default stdout) is a terminal, else PlainDisplay."""
    stream = sys.stdout if stream is None else stream
    return RichDisplay() if stream.isatty() else PlainDisplay(stream)


def describe(status: StageStatus) -> str:
    """One line without the stage's name: `training gla, step 20/120, kl 0.412, 2,310 tokens/s`."""
    parts = [status.phase] if status.phase else []
    if status.total_steps:
        parts.append(f"step {status.step}/{status.total_steps}")
    parts += [f"{name} {value:.4g}" for name, value in list(status.losses.items())[:3]]
    if status.tokens_per_second:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.remaining is not None and status.remaining >= 1:
        parts.append(f"{format_seconds(status.remaining)} left")
    return ", ".join(parts)


def describe_end(status: StageStatus) -> str:
    """How a stage stands when it is not running: `done in 77 s`, `failed: ...`."""
    if status.state == states.DONE:
        return f"done in {format_seconds(status.elapsed)}"
    reason = f": {status.error}" if status.error else ""
    at = f" at step {status.step}/{status.total_steps}" if status.total_steps and status.state != states.PENDING else ""
    return f"{status.state}{at}{reason}"


class PlainDisplay:
    """One line per change of state or phase, one every ten seconds of progress, one a minute without any."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start = time.monotonic()
        self._said: dict[str, tuple[str, str]] = {}
        self._last = 0.0
        self._last_text = ""

    def update(self, statuses: list[StageStatus]) -> None:
        for status in statuses:
            now = time.monotonic()
            key = (status.state, status.phase if status.state == states.RUNNING else "")
            before = self._said.get(status.stage)
            text = describe(status) or "running"
            interval = PLAIN_SILENCE if text == self._last_text else PLAIN_INTERVAL
            due = status.state == states.RUNNING and now - self._last >= interval
            if key == before and not due:
                continue
            self._said[status.stage] = key
            left_over = before is None and status.state not in (states.RUNNING, states.DONE)
            if status.state == states.PENDING or left_over:
                continue  # not started yet, or how an earlier launch ended
            if status.state == states.RUNNING:
                self._last, self._last_text = now, text
                self._print(f"{status.stage}: {text}")
            else:
                already = " (already)" if before is None and status.state == states.DONE else ""
                self._print(f"{status.stage}: {describe_end(status)}{already}")

    def note(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        self._stream.flush()

    def _print(self, text: str) -> None:
        seconds = int(time.monotonic() - self._start)
        print(f"[{seconds // 60:02d}:{seconds % 60:02d}] {text}", file=self._stream, flush=True)


class RichDisplay:
    """A table that stays in place: one row per stage, with a bar for the running one."""

    def __init__(self) -> None:
        # rich costs a tenth of a second to import; --help does not pay it.
        from rich.console import Console
        from rich.live import Live

        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._live.start()

    def update(self, statuses: list[StageStatus]) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        for width in (None, None, 24, None):
            grid.add_column(width=width, no_wrap=True)
        for status in statuses:
            mark, style = _MARKS.get(status.state, ("?", ""))
            running = status.state == states.RUNNING
            text = describe(status) if running else describe_end(status)
            bar = ProgressBar(total=1.0, completed=status.fraction, width=24) if running else Text("")
            shown = "dim" if status.state == states.PENDING else ""
            grid.add_row(
                Text(mark, style=style), Text(status.stage, style=shown or "bold"), bar, Text(text, style=shown)
            )
        self._live.update(grid)

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False)

    def close(self) -> None:
        self._live.stop()
