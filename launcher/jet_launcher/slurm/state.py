"""What Slurm says about jobs. squeue knows the living, sacct the dead and the hours; sacct may be missing.

A squeue that fails is no word about jobs: whoever would delete files or submit again has to stop then (`NoAnswer`).

NeMo-Run's own status is not used: it exits 0 when jobs failed, and calls preempted jobs that wait for a restart FAILED.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from jet_launcher.slurm.ask import ask, by_cluster, command_on, is_number
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
        job_id: Slurm's number, `;cluster` after it for a cluster that sbatch named.
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


def query_jobs(job_ids: Iterable[str], since: str | None = None) -> dict[str, SlurmJob]:
    """State of each job, by ID. Jobs that Slurm knows nothing of are `unknown`.

    Args:
        since: local time as Slurm writes it; accounting leaves out what ended before, such as jobs of the same number.

    Raises:
        NoAnswer: squeue failed.
    """
    found: dict[str, SlurmJob] = {}
    for cluster, ids in by_cluster(job_ids).items():
        jobs = _query(cluster, list(ids), since)
        found.update({job_id: replace(jobs[number], job_id=job_id) for number, job_id in ids.items()})
    return found


def _query(cluster: str, ids: list[str], since: str | None) -> dict[str, SlurmJob]:
    chosen = f"--jobs={','.join(ids)}"
    listed = ask(command_on(cluster, "squeue", "--noheader", "--states=all", chosen, f"--format={_SQUEUE}"))
    if listed.error and _FORGOTTEN not in listed.error:
        raise NoAnswer(listed.error)
    # -D: one row per restart; sacct otherwise counts the last one only.
    options = ["--noheader", "--parsable2", "--allocations", "-D", *([f"--starttime={since}"] if since else [])]
    past = ask(command_on(cluster, "sacct", *options, chosen, f"--format={_SACCT}"))
    jobs = merge(ids, parse_squeue(listed.output), parse_sacct("" if past.error else past.output))
    unknown = [job_id for job_id, job in jobs.items() if job.state == UNKNOWN]
    return {**jobs, **_second_opinion(cluster, unknown)} if unknown and not listed.error else jobs


def _second_opinion(cluster: str, ids: list[str]) -> dict[str, SlurmJob]:
    """What scontrol says of jobs that squeue has left out: nobody may take them for gone because of a filter."""
    one = ids if len(ids) == 1 else []
    said = ask(command_on(cluster, "scontrol", "--all", "--oneliner", "show", "job", *one))
    if said.error and _FORGOTTEN not in said.error and not said.error.startswith("scontrol: "):
        raise NoAnswer(said.error)
    jobs = parse_scontrol("" if said.error else said.output)
    return {job_id: jobs[job_id] for job_id in ids if job_id in jobs}


def unasked(job_ids: Iterable[str]) -> dict[str, SlurmJob]:
    """The same for a Slurm that does not answer."""
    return {job_id: SlurmJob(job_id, word="no answer") for job_id in job_ids}


def jobs_of_command(ours: Callable[[str], bool], cluster: str = "") -> list[str]:
    """IDs of our jobs in the queue whose batch script, with its arguments, `ours` knows.

    Args:
        cluster: that was named to sbatch; "" for none.

    Raises:
        NoAnswer: squeue failed.
    """
    listed = ask(command_on(cluster, "squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%o"))
    if listed.error:
        raise NoAnswer(listed.error)
    rows = (line.strip().partition("|") for line in listed.output.splitlines())
    ids = [number for number, _, command in rows if is_number(number) and ours(command)]
    return [f"{number};{cluster}" if cluster else number for number in ids]


def parse_squeue(text: str) -> dict[str, SlurmJob]:
    """Rows of `squeue --format=%i|%T|%r|%N|%S`."""
    jobs = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 5 and is_number(fields[0].strip()):
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
        if len(fields) != 6 or not (is_number(fields[0]) and fields[3].isdigit() and fields[4].isdigit()):
            continue
        job_id, words, exit_code, elapsed, count, nodes = fields
        word = words.split()[0] if words else ""  # "CANCELLED by 1000"
        seconds = float(elapsed) * int(count)
        if nodes in ("None assigned", ""):
            seconds, nodes = 0.0, ""
        before = jobs[job_id].node_seconds or 0.0 if job_id in jobs else 0.0
        state = _state(word)
        reason = f"exit code {exit_code}" if state == FAILED and word == "FAILED" else ""
        jobs[job_id] = SlurmJob(job_id, state, word, reason, nodes, "", before + seconds)
    return jobs


def parse_scontrol(text: str) -> dict[str, SlurmJob]:
    """Lines of `scontrol --oneliner show job`."""
    jobs = {}
    for line in text.splitlines():
        job = re.match(r"JobId=([1-9][0-9]*) ", line.strip())
        fields = dict(re.findall(r" (JobState|Reason|NodeList)=(\S+)", line)[::-1])  # the first of each counts
        if job and "JobState" in fields:
            word = fields["JobState"]
            reason, nodes = (fields.get(key, "") for key in ("Reason", "NodeList"))
            reason, nodes = ("" if text in ("None", "(null)") else text for text in (reason, nodes))
            jobs[job.group(1)] = SlurmJob(job.group(1), _state(word), word, reason, nodes)
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
    refused = []
    for cluster, ids in by_cluster(job_ids).items():
        said = ask(command_on(cluster, "scancel", *ids)).error.splitlines()
        refused += [line for line in said if not any(word in line for word in _ENDED)]
    if refused:
        raise UserError("; ".join(refused))


def _state(word: str) -> str:
    return _STATES.get(word.rstrip("+"), UNKNOWN)
