"""Whether this process gets anywhere, seen from outside its work: for the thread that watches (writers.py).

A rank that sleeps for ever, or that hangs in a call which never returns, has living threads and beats like any other.
What tells is that its main thread is found at the same place at every look, and that the process reads and writes
nothing meanwhile, nor ticks (configs/ticks.py). Ranks that wait for others in a collective stand still as well, and
are not to blame.
"""

import sys
import threading
from pathlib import Path
from types import FrameType

from megatron_jet.configs.ticks import watched_ticks

MOVING_BYTES = 1 << 20  # read or written between two looks: more than the watch itself, less than any real work
_COLLECTIVES = "distributed_c10d.py"  # torch's; none of its functions calls our code
_AGREEMENTS = ("training/collectives.py", "any_rank")  # waits on a GPU for the sum of all ranks


class Standstill:
    """Looks of one thread at the main thread, which makes this object.

    Attributes:
        looks: how often in a row it was found where it was before.
        waits: whether it was in a collective at the last look.
    """

    def __init__(self):
        self.looks, self.waits = 0, False
        self._place: tuple = ()
        self._ticks, self._bytes = watched_ticks(), _bytes_moved()

    def look(self, starved: bool) -> None:
        """Look once more.

        Args:
            starved: much more time than usual has passed; the process was stopped itself, and nothing can be said.
        """
        frames = _stack()
        place = (self._ticks.count, *((id(frame.f_code), frame.f_lasti) for frame in frames))
        moved = _bytes_moved()
        same = place == self._place and moved - self._bytes < MOVING_BYTES
        self.looks = self.looks + 1 if same and not starved else 0
        self._place, self._bytes = place, moved
        self.waits = any(frame.f_code.co_filename.endswith(_COLLECTIVES) for frame in frames) or (
            bool(frames)
            and frames[0].f_code.co_filename.endswith(_AGREEMENTS[0])
            and frames[0].f_code.co_name == _AGREEMENTS[1]
        )


def _stack() -> list[FrameType]:
    """Frames of the main thread, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _bytes_moved() -> int:
    """Read and written so far by this process; 0 where the system does not say."""
    try:
        rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return sum(int(rows[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    except (OSError, ValueError, KeyError):
        return 0
