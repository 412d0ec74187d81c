"""SIGTERM, SIGUSR1, Ctrl-C and the SIGHUP of a terminal that closes: noted and acted on where it is safe, or an
exception that nobody swallows."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """Stopped on a signal, with nothing lost. Programs exit with status 75: worth requeueing.

    No `Exception`: libraries and our own readers catch those and would report a damaged file instead.
    """


class StopRequest:
    """Context manager that notes stop signals instead of dying of them. A second Ctrl-C stops at once.

    A request that nobody answered by raising is handed on at the end to an `interruptible` block around it.
    Only the main thread may install handlers; elsewhere nothing is caught.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        self._previous = _install(self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        previous, self._previous = self._previous, {}
        restore_signals(previous)
        if self.signal is None or error is not None:
            return
        outer = getattr(previous.get(self.signal), "__self__", None)
        if isinstance(outer, interruptible):
            outer.stop(self.signal)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


class interruptible:  # noqa: N801 (read as a verb: `with interruptible():`)
    """Context manager that turns SIGTERM, SIGUSR1 and Ctrl-C into `Interrupted` at the next bytecode.

    A request is never lost: one that was swallowed on its way (Python drops exceptions in destructors), or that showed
    as an error because another process left first, ends the block as `Interrupted`, too.
    Only the main thread may install handlers; elsewhere nothing is caught.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def stop(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. Once it is stopping, more signals change nothing; Ctrl-C may hurry it."""
        first = self.signal is None
        self.signal = signal.Signals(number)
        if first or number == signal.SIGINT:
            raise self._interruption()

    def __enter__(self) -> "interruptible":
        self._previous = _install(self.stop)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        previous, self._previous = self._previous, {}
        restore_signals(previous)
        if self.signal is not None and (error is None or isinstance(error, Exception)):
            raise self._interruption() from error

    def _interruption(self) -> Interrupted:
        return Interrupted(f"stopped by {self.signal.name}")


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Put a handler in place for all stop signals; what was there before, by signal."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # A terminal that closes is nothing to what `nohup` started.
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore_signals(previous: dict[int, object]) -> None:
    """Put handlers back that were there before."""
    for number, handler in previous.items():
        signal.signal(number, handler)


def stop_on_signals() -> dict[int, object]:
    """End this command on SIGTERM, and on SIGHUP of a terminal that closes, as on Ctrl-C: what is half-written goes.

    A signal that is ignored stays so (`nohup`). Main thread only; elsewhere nothing is caught.

    Returns:
        The handlers that were there before, by signal, of those that were replaced.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return {}
    replaced = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    return {number: signal.signal(number, stop) for number in replaced}
