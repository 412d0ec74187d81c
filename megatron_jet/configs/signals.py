"""Stop signals: noted and acted on where it is safe, or turned into an exception that nobody swallows."""

import signal
import threading
from types import FrameType

EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(BaseException):
    """Stopped on a signal, with nothing lost. Programs exit with status 75: worth requeueing.

    No `Exception`: libraries and our own readers catch those and would report a damaged file instead.
    """


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


def stop_on_signals() -> None:
    """End this command on SIGTERM, and on SIGHUP of a terminal that closes, as on Ctrl-C: what is half-written goes.

    A signal that is ignored stays so (`nohup`). Main thread only.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)
