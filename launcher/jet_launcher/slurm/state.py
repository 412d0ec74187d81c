"""What Slurm says about jobs. squeue knows the living, sacct the dead and the hours; sacct may be missing.

A squeue that fails is no word about jobs: whoever would delete files or submit again has to stop then (`NoAnswer`).

NeMo-Run's own status is not used: it exits 0 when jobs failed, and calls preempted jobs that wait for a restart FAILED.
"""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.errors import UserError

PENDING, RUNNING, DONE, CANCELLED, FAILED, UNKNOWN = "pending", "running", "done", "cancelled", "failed", "unknown"
LIVE = (PENDING, RUNNING)

_STATES = {
    "PENDING": PENDING,
    "REQUEUED": PENDING,
    "REQUEUE_HOLD": PENDING,
    "REQUEUE_FED": PENDING,
    "SPECIAL_EXIT": PENDING,
    "RESV_DEL_HOLD": PENDING,
    "RUNNING": RUNNING,
    "CONFIGURING": RUNNING,
    "COMPLETING": RUNNING,
    "RESIZING": RUNNING,
    "SIGNALING": RUNNING,
    "STAGE_OUT": RUNNING,
    "STOPPED": RUNNING,
    "SUSPENDED": RUNNING,
    "COMPLETED": DONE,
    "CANCELLED": CANCELLED,
    "REVOKED": CANCELLED,
    "FAILED": FAILED,
    "TIMEOUT": FAILED,
    "NODE_FAIL": FAILED,
    "OUT_OF_MEMORY": FAILED,
    "PREEMPTED": FAILED,
    "BOOT_FAIL": FAILED,
    "DEADLINE": FAILED,
}
_SQUEUE = "%i|%T|%r|%N|%S"
_SACCT = "JobID,State,ExitCode,ElapsedRaw,NNodes,NodeList"
_TIMEOUT = 60.0
# The one failure of squeue that is an answer: it was asked about a single job and has forgotten it.
_FORGOTTEN = "Invalid job id specified"
# scancel's complaints about jobs that have ended.
_ENDED = (_FORGOTTEN, "already completing or completed")


class NoAnswer(UserError):
    """squeue failed: nobody can tell which jobs wait or run."""

    def __init__(self, reason: str) -> None:
        reason = "; ".join(reason.splitlines())
        super().__init__(
            f"Slurm does not answer ({reason}), so nobody can tell which jobs wait or run; try again when squeue works"
        )
        self.reason = reason


@dataclass(frozen=True)
class SlurmJob:
    """One job as Slurm sees it.

    Attributes:
        job_id: Slurm's number.
        state: pending, running, done, cancelled, failed or unknown.
        word: Slurm's own word for it, such as TIMEOUT.
        reason: why it waits or ended, in Slurm's word; "" where there is none.
        nodes: node list such as n[1-2].
        start: expected start of a waiting job, as Slurm prints it.
        node_seconds: elapsed time times nodes, summed over all restarts; None without sacct.
    """

    job_id: str
    state: str = UNKNOWN
    word: str = ""
    reason: str = ""
    nodes: str = ""
    start: str = ""
    node_seconds: float | None = None

    @property
    def live(self) -> bool:
        return self.state in LIVE


def query_jobs(job_ids: Iterable[str]) -> dict[str, SlurmJob]:
    """State of each job, by ID. Jobs that neither squeue nor sacct knows are `unknown`.

    Raises:
        NoAnswer: squeue failed.
    """
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    listed = _ask(["squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", f"--format={_SQUEUE}"])
    if listed.error and _FORGOTTEN not in listed.error:
        raise NoAnswer(listed.error)
    # -D: one row per restart; sacct otherwise counts the last one only.
    past = _ask(
        ["sacct", "--noheader", "--parsable2", "--allocations", "-D", f"--jobs={','.join(ids)}", f"--format={_SACCT}"]
    )
    return merge(ids, parse_squeue(listed.output), parse_sacct("" if past.error else past.output))


def unasked(job_ids: Iterable[str]) -> dict[str, SlurmJob]:
    """The same for a Slurm that does not answer."""
    return {job_id: SlurmJob(job_id, word="no answer") for job_id in job_ids}


def jobs_of_scripts(folder: Path) -> list[str]:
    """IDs of our jobs in the queue whose batch script is under `folder`.

    Raises:
        NoAnswer: squeue failed.
    """
    listed = _ask(["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%o"])
    if listed.error:
        raise NoAnswer(listed.error)
    rows = (line.strip().partition("|") for line in listed.output.splitlines())
    return [job_id for job_id, _, script in rows if script.startswith(f"{folder}/")]


def parse_squeue(text: str) -> dict[str, SlurmJob]:
    """Rows of `squeue --format=%i|%T|%r|%N|%S`."""
    jobs = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 5:
            job_id, word, reason, nodes, start = (field.strip() for field in fields)
            reason = "" if reason in ("None", "(null)") else reason
            start = "" if start in ("N/A", "") or _state(word) != PENDING else start
            jobs[job_id] = SlurmJob(job_id, _state(word), word, reason, nodes, start)
    return jobs


def parse_sacct(text: str) -> dict[str, SlurmJob]:
    """Rows of `sacct -D` with the columns of `_SACCT`; the last row of a job is its newest attempt."""
    jobs: dict[str, SlurmJob] = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 6:
            continue
        job_id, words, exit_code, elapsed, count, nodes = fields
        word = words.split()[0] if words else ""  # "CANCELLED by 1000"
        seconds = float(elapsed or 0) * int(count or 0)
        if nodes in ("None assigned", ""):
            seconds, nodes = 0.0, ""
        before = jobs[job_id].node_seconds or 0.0 if job_id in jobs else 0.0
        state = _state(word)
        reason = f"exit code {exit_code}" if state == FAILED and word == "FAILED" else ""
        jobs[job_id] = SlurmJob(job_id, state, word, reason, nodes, "", before + seconds)
    return jobs


def merge(ids: list[str], listed: dict[str, SlurmJob], past: dict[str, SlurmJob]) -> dict[str, SlurmJob]:
    """squeue decides the state, sacct adds hours and what squeue has forgotten."""
    merged = {}
    for job_id in ids:
        now, before = listed.get(job_id), past.get(job_id)
        if now is None:
            merged[job_id] = before or SlurmJob(job_id)
        else:
            seconds = before.node_seconds if before else None
            merged[job_id] = SlurmJob(**{**now.__dict__, "node_seconds": seconds})
    return merged


def cancel_jobs(job_ids: Iterable[str]) -> None:
    """scancel. Jobs that have ended are no error.

    Raises:
        UserError: scancel refused a job or did not reach Slurm; the others are cancelled.
    """
    ids = list(job_ids)
    if not ids:
        return
    refused = [line for line in _ask(["scancel", *ids]).error.splitlines() if not any(word in line for word in _ENDED)]
    if refused:
        raise UserError("; ".join(refused))


def _state(word: str) -> str:
    return _STATES.get(word.rstrip("+"), UNKNOWN)


@dataclass(frozen=True)
class _Answer:
    """What a Slurm command printed, and why it failed ("" when it did not)."""

    output: str
    error: str


def _ask(command: list[str]) -> _Answer:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return _Answer("", f"{command[0]}: no answer within {_TIMEOUT:.0f} s")
    except OSError as error:
        return _Answer("", f"{command[0]}: {error.strerror or error}")
    if done.returncode == 0:
        return _Answer(done.stdout, "")
    lines = filter(None, map(str.strip, done.stderr.splitlines()))
    return _Answer(done.stdout, "\n".join(lines) or f"{command[0]} ended with {done.returncode}")
