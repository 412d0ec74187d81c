"""Long waits say that they get somewhere, to whoever watches (postnas/writers.py): a disk that takes its time shows
nowhere else."""

from contextvars import ContextVar


class Ticks:
    """How often work has said that it goes on."""

    def __init__(self):
        self.count = 0


_TICKS: ContextVar[Ticks | None] = ContextVar("ticks", default=None)


def watched_ticks() -> Ticks:
    """A counter for the work that this thread does from now on."""
    ticks = Ticks()
    _TICKS.set(ticks)
    return ticks


def tick() -> None:
    """Say that the work of this thread goes on."""
    ticks = _TICKS.get()
    if ticks is not None:
        ticks.count += 1
