"""What Slurm says about jobs. squeue knows the living, sacct the dead and the hours; either may be missing.

NeMo-Run's own status is not used: it exits 0 when jobs failed, and calls preempted jobs that wait for a restart FAILED.
"""

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

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
    """State of each job, by ID. Jobs that neither squeue nor sacct knows are `unknown`."""
    ids = list(dict.fromkeys(job_ids))
    if not ids:
        return {}
    listed = _run(["squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", f"--format={_SQUEUE}"])
    # -D: one row per restart; sacct otherwise counts the last one only.
    past = _run(
        ["sacct", "--noheader", "--parsable2", "--allocations", "-D", f"--jobs={','.join(ids)}", f"--format={_SACCT}"]
    )
    return merge(ids, parse_squeue(listed or ""), parse_sacct(past or ""))


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
    """scancel. Jobs that have ended are no error."""
    ids = list(job_ids)
    if ids:
        _run(["scancel", *ids])


def _state(word: str) -> str:
    return _STATES.get(word.rstrip("+"), UNKNOWN)


def _run(command: list[str]) -> str | None:
    """Output of a Slurm command; None when there is no such command, it fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
