"""SIGTERM, SIGUSR1 and Ctrl-C ask the trainer to save and stop at the end of a step."""

import signal
import threading
from types import FrameType

EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):
    """Training stopped on a signal after saving. Programs exit with status 75: worth requeueing."""


class StopRequest:
    """Context manager that notes stop signals instead of dying of them. A second Ctrl-C stops at once.

    Only the main thread may install handlers; elsewhere nothing is caught.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
