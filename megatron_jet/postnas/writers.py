"""One writer per stage, and a watch over the processes that write.

Every rank holds the lock `locks/STAGE[:CANDIDATE]@RANK` of the run directory while it works on a stage, so that a
second worker is refused, also where the first was thought dead and is only stopped. Into its lock file a thread of each
rank writes that it lives, and for how long its work has stood still. Each rank watches the next one and itself; one
that has not moved for too long ends all, with its name and with the stacks of every rank in the log.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_jet.configs.attempts import fenced
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json_object, write_json
from megatron_jet.configs.lock import exclusive, lock_holder
from megatron_jet.postnas.processes import gather, rank, world_size
from megatron_jet.postnas.standstill import Standstill

FOLDER = "locks"
LAUNCHED = "JET_RUN_TOKEN"  # set by the launcher, which holds the run's own lock
LEAVING_SECONDS = 60.0  # for a worker whose launcher died, or an attempt that another has taken over from, to leave
RECORD_BYTES = 256
BEATS = 10  # within the time after which a rank counts as wedged
LONGEST_BEAT = 30.0  # seconds


@contextmanager
def stage_writer(run_dir: Path, stage: str, candidate: str | None, wedged_after: float) -> Iterator[None]:
    """Be the one worker that writes a stage or a candidate while the block runs. Collective over all ranks.

    Args:
        wedged_after: seconds after which a rank that does not move ends the job; 0: never.

    Raises:
        UserError: on all ranks, when another worker is at it.
    """
    name = stage if candidate is None else f"{stage}:{candidate}"
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    directory = run_dir / "stages" / stage / ("" if candidate is None else f"jobs/{candidate}")
    with ExitStack() as stack:
        handle = _acquire(stack, folder, name, directory)
        watch = Watch(folder, name, directory, handle, wedged_after)
        if rank() == 0:
            watch.notice.unlink(missing_ok=True)
        gather(None)  # nobody watches a rank that has no record yet, nor sees a notice of an earlier attempt
        if wedged_after > 0 and handle is not None:
            stack.enter_context(watch)
        yield


def _acquire(stack: ExitStack, folder: Path, name: str, directory: Path) -> int | None:
    """Lock this rank's file. None: the lock is held by an attempt that may not write any more, which is as good."""
    until = time.monotonic() + (LEAVING_SECONDS if fenced() or LAUNCHED in os.environ else 0.0)
    while True:
        with ExitStack() as attempt:
            handle, problem = None, None
            try:
                handle = attempt.enter_context(exclusive(folder / f"{name}@{rank()}", _ADVICE, directory))
                problem = _others(folder, name, directory)
            except UserError as error:
                problem = str(error)
            problem = next((p for p in gather(problem) if p is not None), None)
            if problem is None:
                stack.enter_context(attempt.pop_all())
                return handle
        late = any(gather(time.monotonic() >= until))
        if late and fenced():
            print(f"{problem}; it is of an earlier attempt, and this one goes on without its lock", flush=True)
            return None
        if late:
            raise UserError(problem)
        time.sleep(0.5)


_ADVICE = (
    "wait for it to end. If the run was thought dead, `kill -CONT` lets the process save and leave, `kill -9` ends it"
)


def _others(folder: Path, name: str, directory: Path) -> str | None:
    """Who else works on this: more ranks of another worker, the candidates of this stage, or the stage of this one."""
    stage, _, candidate = name.partition(":")
    related = [f"{stage}@*"] if candidate else [f"{stage}:*@*"]
    own = {folder / f"{name}@{number}" for number in range(world_size())}
    for path in sorted({path for pattern in (f"{name}@*", *related) for path in folder.glob(pattern)} - own):
        holder = lock_holder(path)
        if holder is not None:
            return f"{directory}: process {holder.pid} on {holder.host} works on {path.name.split('@')[0]}; {_ADVICE}"
    return None


class Watch:
    """A thread that says that this rank lives and looks whether the next one does, and whether this one gets anywhere.

    A rank whose work stands still is wedged, unless it waits for others in a collective; those that wait are wedged
    when all stand still. What counts is how often this rank looked, not the time: a job that is suspended and goes on
    finds nobody wedged.
    """

    def __init__(self, folder: Path, name: str, directory: Path, handle: int | None, limit: float):
        self.folder, self.name, self.directory, self.handle = folder, name, directory, handle
        self.limit = limit
        self.beat = min(LONGEST_BEAT, limit / BEATS)
        self.notice = folder / f"{name}.wedged"
        self._done = threading.Event()
        self._beats = 0
        self._standstill = Standstill()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._write_record()
        gather(None)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        neighbour = (rank() + 1) % world_size()
        seen, unmoved, looked = b"", 0, time.monotonic()
        while not self._done.wait(self.beat):
            now = time.monotonic()
            starved = now - looked > 3 * self.beat  # this rank did not get to look: it was stopped itself, or is slow
            self._standstill.look(starved)
            self._write_record()
            if self.notice.exists():
                self._leave()
            record = self._record(neighbour)
            unmoved = unmoved + 1 if record == seen and not starved and neighbour != rank() else 0
            seen, looked = record, now
            wedged = neighbour if unmoved * self.beat >= self.limit else self._standing()
            if wedged is not None and not self._done.is_set():
                self._declare(wedged, self._record(wedged))

    def _standing(self) -> int | None:
        """A rank whose work has stood still for too long: this one; or, where all wait for each other, the first."""
        if self._standstill.looks * self.beat < self.limit:
            return None
        if not self._standstill.waits:
            return rank()
        still = [_still(self._record(number)) for number in range(world_size())]
        return still.index(max(still)) if min(still) >= self.limit else None

    def _write_record(self) -> None:
        self._beats += 1
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "beat": self._beats}
        record["still"] = round(self._standstill.looks * self.beat, 3)
        if self.handle is not None:
            os.pwrite(self.handle, json.dumps(record).ljust(RECORD_BYTES).encode(), 0)
            os.fsync(self.handle)  # otherwise another node may see it much later

    def _record(self, number: int) -> bytes:
        try:
            return (self.folder / f"{self.name}@{number}").read_bytes()
        except OSError:
            return b""

    def _declare(self, number: int, record: bytes) -> None:
        """Tell all ranks, and wake the wedged one, so that its stacks can be seen."""
        try:
            found = json.loads(record)
            who = f"rank {number} (process {found['pid']} on {found['host']})"
        except (ValueError, KeyError, TypeError):
            found, who = {}, f"rank {number}"
        said = f"{who} has not moved for {self.limit:.0f} seconds; the stacks of all ranks are in the log"
        self.notice.write_text(said)
        ours = found.get("host") == socket.gethostname() and found["pid"] != os.getpid()
        if ours and _is_one_of_us(found["pid"]):
            os.kill(found["pid"], signal.SIGUSR2)
            os.kill(found["pid"], signal.SIGCONT)
        if number == 0:
            self._write_status(said)
        self._leave()

    def _leave(self) -> None:
        said = self.notice.read_text()
        if rank() == 0:
            self._write_status(said)
        os.write(2, f"error: {said}\nstacks of rank {rank()} (process {os.getpid()}):\n".encode())
        faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(2 * self.beat)  # the others get to say theirs: the first that ends takes the rest along
        os._exit(1)

    def _write_status(self, said: str) -> None:
        path = self.directory / "status.json"
        try:
            row = read_json_object(path)
        except UserError:
            row = {}
        write_json(path, {**row, "state": "failed", "message": said})


def _still(record: bytes) -> float:
    """Seconds for which a rank's work has stood still, by its record."""
    try:
        return float(json.loads(record)["still"])
    except (ValueError, KeyError, TypeError):
        return 0.0


def _is_one_of_us(pid: int) -> bool:
    """Whether a process on this machine runs the command that this one runs; IDs are handed out again."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == Path("/proc/self/cmdline").read_bytes()
    except OSError:
        return False


def stacks_on_demand() -> None:
    """Have `kill -USR2 PID` write the stacks of all threads into the log."""
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__.fileno(), all_threads=True)
