"""Running stages on this machine: start the worker, show what it does, pass signals on, say how it ended."""

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jet_launcher import stage_status as states
from jet_launcher.exit_codes import DONE, FAILED, INTERRUPTED
from jet_launcher.processes import WorkerProcesses, worker_command, worker_environment
from jet_launcher.progress import Display
from jet_launcher.run_directory import DEFAULT_ROOT, RunDirectory
from jet_launcher.signals import Interrupts, caught_signals
from jet_launcher.stage_status import StageStatus, read_run

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2
SHOWN_LOG_LINES = 12
_ROOT_CAUSE = re.compile(r"Root Cause.*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
LEFTOVER_GRACE = 10.0  # seconds for ranks whose torchrun agent died


@dataclass(frozen=True)
class Outcome:
    """How the worker ended: the exit code to hand on, and one line for the user when it is not 0."""

    exit_code: int
    message: str = ""
    log_tail: tuple[str, ...] = ()


def run_local(run: RunDirectory, stages: Sequence[str], nproc: int, display: Display) -> Outcome:
    """Run `stages` in one worker and wait for it. The caller holds the run lock.

    The first interrupt asks the ranks to save; the second one kills them. Nothing that the worker started is left.
    """
    stages = tuple(stages)
    started = time.time()
    log_start = run.log_file.stat().st_size if run.log_file.exists() else 0
    with caught_signals() as interrupts:
        worker = WorkerProcesses(
            worker_command(run.path.resolve(), stages, nproc), worker_environment(nproc, ROOT), run.log_file
        )
        try:
            code = _wait(worker, run, stages, nproc, display, interrupts)
        finally:
            worker.clean_up(LEFTOVER_GRACE)
    statuses = read_run(run, stages)
    display.update(statuses)
    if nproc > 1 and code != DONE:
        code = rank_exit_code(run.log_file, log_start) or code
    return _outcome(run, statuses, code, started, interrupted=interrupts.count > 0)


def _wait(
    worker: WorkerProcesses,
    run: RunDirectory,
    stages: tuple[str, ...],
    nproc: int,
    display: Display,
    interrupts: Interrupts,
) -> int:
    answered = 0
    while (code := worker.poll()) is None:
        if interrupts.count > answered:
            answered = interrupts.count
            if answered == 1:
                display.note("stopping: the worker saves its state (once more: kill it at once)")
                worker.ask_to_stop(ranks_only=nproc > 1)
            else:
                display.note("killing the worker")
                worker.kill()
        display.update(read_run(run, stages))
        time.sleep(POLL_SECONDS)
    return code


def _outcome(run: RunDirectory, statuses: list[StageStatus], code: int, started: float, interrupted: bool) -> Outcome:
    """Exit code and message from the worker's return code and what the stages wrote."""
    unfinished = [status.stage for status in statuses if status.state != states.DONE]
    if code == DONE:
        said = f"the worker ended without an error but did not finish {', '.join(unfinished)} (log: {run.log_file})"
        return Outcome(FAILED, said) if unfinished else Outcome(DONE)
    resume = f"continue with: python launcher/postnas.py resume {shown_id(run)}"
    # status.json keeps whole seconds.
    fresh = [status for status in statuses if status.updated is not None and status.updated >= int(started)]
    stopped = next(
        (s for s in fresh if s.state in (states.FAILED, states.RUNNING, states.KILLED, states.INTERRUPTED)), None
    )
    failed = stopped is not None and stopped.state == states.FAILED
    if not failed and (interrupted or code == INTERRUPTED):
        return Outcome(INTERRUPTED, f"interrupted{_where(stopped)}; {resume}")
    log = run.stage(stopped.stage) / "log.txt" if stopped is not None else run.log_file
    # A rank that was killed explains more than what the others said when they lost it.
    if failed and stopped.error and code >= 0:
        return Outcome(FAILED, f"{stopped.stage} failed: {stopped.error} (log: {log}); after the repair {resume}")
    message = f"the worker {_death(code)}{_where(stopped)} (log: {log}); {resume}"
    return Outcome(FAILED, message, log_tail(log, SHOWN_LOG_LINES))


def shown_id(run: RunDirectory) -> str:
    """What to type for this run: its name under runs/, its path elsewhere."""
    in_root = run.path.resolve().parent == DEFAULT_ROOT.resolve()
    return run.id if in_root else str(run.path)


def _where(status: StageStatus | None) -> str:
    if status is None:
        return ""
    step = f", step {status.step} of {status.total_steps}" if status.total_steps else ""
    return f" in {status.stage}{step}"


def _death(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (the kernel sends it too when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def rank_exit_code(log: Path, start: int) -> int | None:
    """How the first failing rank ended, from torchrun's summary (negative: by that signal); None when there is none.

    torchrun itself ends with 1 whatever happened to a rank, and asks the other ranks to stop: they save and say
    `interrupted` although a rank was killed.
    """
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    match = _ROOT_CAUSE.search(text)
    return int(match.group(1)) if match else None


def log_tail(path: Path, lines: int) -> tuple[str, ...]:
    """The last `lines` lines of a log, none when it does not exist."""
    try:
        with open(path, "rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - 20_000))
            text = log.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(text.splitlines()[-lines:])
