"""Ctrl-C, SIGTERM and a closed terminal, acted on where it is safe instead of where they happen to arrive."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Counts them.

    Attributes:
        count: how many have come.
    """

    def __init__(self, said: Callable[[], None] | None = None) -> None:
        """`said` is called at the first one."""
        self.count = 0
        self._said = said

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1 and self._said is not None:
            self._said()


@contextlib.contextmanager
def caught_signals(said: Callable[[], None] | None = None) -> Iterator[Interrupts]:
    """Count signals instead of ending. Main thread only."""
    interrupts = Interrupts(said)
    before = {number: signal.signal(number, interrupts) for number in NUMBERS}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shielded_children() -> Iterator[None]:
    """Processes that this thread starts do not notice signals; for this thread they wait until afterwards.

    A terminal sends Ctrl-C to every process of the group; sbatch would die of it and not say what it did.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
