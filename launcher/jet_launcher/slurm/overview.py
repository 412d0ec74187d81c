"""The jobs of a run as a user wants to see them: Slurm's word, the stage's own progress, and why a job did not run."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jet_launcher.progress import describe
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.ask import number_of, release_words
from jet_launcher.slurm.graph import Job
from jet_launcher.slurm.record import ClusterRecord
from jet_launcher.slurm.state import (
    CANCELLED,
    DONE,
    FAILED,
    LIVE,
    PENDING,
    RUNNING,
    UNKNOWN,
    NoAnswer,
    SlurmJob,
    query_jobs,
    unasked,
)
from jet_launcher.stage_status import StageStatus, read_status
from megatron_jet.configs.estimate_text import table

# Slurm's reasons that no patience helps against, and what to do about them.
_BEYOND = "asks for more than the partition allows"
_STUCK = {
    "PartitionConfig": f"{_BEYOND} (time_limit, nodes, account or qos)",
    "PartitionTimeLimit": f"time_limit {_BEYOND}",
    "PartitionNodeLimit": f"nodes {_BEYOND}",
    "BadConstraints": "no node fits constraint, exclude and the sbatch options",
    "JobHeldAdmin": "held by an administrator",
    "InvalidAccount": "account is not known to Slurm",
    "InvalidQOS": "qos is not known to Slurm",
}
_HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_LIMIT = "a limit of your account or QOS, reached for now or too low for this job"


# Of a status.json that an earlier attempt has left.
_NO_PROGRESS = {"state": "pending", "phase": "", "step": 0, "total_steps": 0, "losses": {}, "tokens_per_second": None}
_NO_PROGRESS |= {"first_step": 0, "first_step_at": None}


@dataclass(frozen=True)
class Attempt:
    """An event of a job in cluster/attempts/: start, end, limit, preflight or failed.

    Attributes:
        restart: how often the job had been queued again by then.
        text: nodes for a start, else exit code and reason.
        time: Unix seconds.
    """

    event: str
    job_id: str
    restart: int
    text: str
    time: float = 0.0


@dataclass(frozen=True)
class JobView:
    """One job of a run.

    Attributes:
        state: pending, running, done, cancelled, failed or unknown (Slurm has forgotten it and left no trace).
        note: why it waits, or why it ended without a result.
        gpu_hours: node-hours times GPUs per node so far; node-hours on CPU nodes; None without accounting.
    """

    job: Job
    job_id: str
    state: str
    slurm: SlurmJob
    status: StageStatus
    restarts: int
    note: str
    gpu_hours: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for --json."""
        return {
            "name": self.job.name,
            "stage": self.job.stage,
            "target": self.job.target,
            "state": self.state,
            "job_id": self.job_id,
            "slurm_state": self.slurm.word,
            "nodes": self.slurm.nodes,
            "node_count": self.job.nodes,
            "restarts": self.restarts,
            "depends": list(self.job.depends),
            "note": self.note,
            "measured": {"gpu_hours": self.gpu_hours},
            "progress": self.status.to_dict(),
        }


def state_dir(run: RunDirectory, job: Job) -> Path:
    """Where a job's status.json and result.json are."""
    candidate = job.target.partition(":")[2]
    return run.stage(job.stage) / "jobs" / candidate if candidate else run.stage(job.stage)


def finished(run: RunDirectory, job: Job) -> bool:
    """Whether the job's result is there. Results are written last and bound to their inputs by the stage itself."""
    return (state_dir(run, job) / "result.json").is_file() or (run.stage(job.stage) / "result.json").is_file()


def job_views(run: RunDirectory, record: ClusterRecord) -> list[JobView]:
    """Every job of the run, with one call of squeue and one of sacct. Raises NoAnswer when squeue fails."""
    return _views(run, record, query_jobs(record.all_job_ids, record.since))


def shown_views(run: RunDirectory, record: ClusterRecord) -> tuple[list[JobView], str]:
    """Every job of the run, and why Slurm's part is missing ("" when it is there): files tell who is done, at least."""
    try:
        return job_views(run, record), ""
    except NoAnswer as error:
        return _views(run, record, unasked(record.all_job_ids)), error.reason


def stuck_reason(job: SlurmJob) -> str:
    """What keeps a waiting job from ever starting, in words; "" when it only waits for its turn."""
    if job.state != PENDING:
        return ""
    if job.reason in _STUCK:
        return _STUCK[job.reason]
    # "launch failed requeued held" of a node that could not start it, "job requeued in held state", JobHeldUser, ...
    if job.word in _HELD or re.search("held|hold", job.reason, re.IGNORECASE):
        cause = "a node failed to launch it" if "launch failed" in job.reason else "it waits until somebody lets it go"
        return f"Slurm holds it ({cause}); {release_words(job.job_id)}"
    return _LIMIT if job.reason.startswith(("Assoc", "QOS", "MaxGRES")) else ""


def _views(run: RunDirectory, record: ClusterRecord, slurm: dict[str, SlurmJob]) -> list[JobView]:
    views: list[JobView] = []
    for entry in record.jobs:
        attempts = read_attempts(run, entry.job.name, entry.job_id)
        views.append(_view(run, entry.job, slurm[entry.job_id], attempts, _spent(record, entry.job, slurm)))
    by_name = {view.job.name: view for view in views}
    return [_explained(view, by_name) for view in views]


def run_word(views: list[JobView]) -> str:
    """One word for the whole run."""
    states = {view.state for view in views}
    for word in (RUNNING, FAILED, CANCELLED, PENDING):
        if word in states and not (word in (FAILED, CANCELLED) and states & set(LIVE)):
            return word
    return DONE if states == {DONE} else RUNNING if states & set(LIVE) else UNKNOWN


def read_attempts(run: RunDirectory, name: str, job_id: str) -> list[Attempt]:
    """Events of one job, oldest first."""
    path = run.path / "cluster" / "attempts" / f"{name}.log"
    if not path.is_file():
        return []
    rows = (line.split(maxsplit=5) for line in path.read_text(errors="replace").splitlines())
    number = number_of(job_id)
    return [
        Attempt(r[1], r[2], int(r[3]), r[5] if len(r) > 5 else "", float(r[0]))
        for r in rows
        if len(r) > 4 and r[2] == number and r[0].isdigit() and r[3].isdigit()  # a full disk cuts lines
    ]


def _view(run: RunDirectory, job: Job, slurm: SlurmJob, attempts: list[Attempt], spent: float | None) -> JobView:
    status = read_status(state_dir(run, job) / "status.json", job.name)
    state = slurm.state
    if finished(run, job) and state not in LIVE:
        state = DONE
    elif state == DONE:
        state = FAILED  # left without an error and without a result
    restarts = max((attempt.restart for attempt in attempts), default=0)
    if state == PENDING and attempts:
        restarts += 1
    note = _note(state, slurm, status, attempts)
    last = attempts[-1] if attempts else None
    if state == RUNNING and last and last.event == "start" and last.time > (status.updated or 0.0):
        note, status = _starting(run, job, last, status), replace(status, **_NO_PROGRESS)
    return JobView(job, slurm.job_id, state, slurm, status, restarts, note, spent)


def _starting(run: RunDirectory, job: Job, attempt: Attempt, status: StageStatus) -> str:
    """What an attempt does before its worker says something: step and speed in status.json are of the one before."""
    folder, name = run.path / "cluster" / "preflight", f"{attempt.job_id}.{attempt.restart}"
    logs = (run.stage(job.stage) / "logs").glob(f"{job.name}.{name}.*")
    word = "preflight" if (folder / name).is_dir() and not any(logs) else "starting"
    return f"{word} (was at step {status.step}/{status.total_steps})" if status.total_steps else word


def _note(state: str, slurm: SlurmJob, status: StageStatus, attempts: list[Attempt]) -> str:
    last = attempts[-1] if attempts else None
    if state == PENDING:
        stuck = stuck_reason(slurm)
        why = slurm.reason + (f": {stuck}" if stuck else f", expected {slurm.start}" if slurm.start else "")
        return f"waits to go on after: {_said(last)} ({why})" if last else why
    if state in (FAILED, UNKNOWN):
        said = (
            _said(last) if last and last.event in ("failed", "end", "limit", "preflight") else slurm.word or "no record"
        )
        return said + (f": {status.error}" if status.error and status.state == "failed" else "")
    return ""


def _said(attempt: Attempt) -> str:
    """The reason in an event; the first word of all but `start` is an exit code."""
    return "node failure or kill" if attempt.event == "start" else attempt.text.partition(" ")[2]


def _spent(record: ClusterRecord, job: Job, slurm: dict[str, SlurmJob]) -> float | None:
    """Hours of every submission of a job."""
    ids = [row["job_id"] for s in record.submissions for row in s["jobs"] if row["job"]["name"] == job.name]
    seconds = [slurm[job_id].node_seconds for job_id in ids]
    if all(value is None for value in seconds):
        return None
    return sum(value or 0.0 for value in seconds) / 3600 * max(1, job.gpus)


def _explained(view: JobView, by_name: dict[str, JobView]) -> JobView:
    """A cancelled job that never started says which job it waited for."""
    if view.state != CANCELLED:
        return view
    culprit = _culprit(view, by_name)
    note = f"not started: {culprit.job.name} {culprit.state}" if culprit else "cancelled"
    if culprit is not None and culprit.note and culprit.state != CANCELLED:
        note += f" ({culprit.note})"
    return JobView(**{**view.__dict__, "note": note})


def _culprit(view: JobView, by_name: dict[str, JobView]) -> JobView | None:
    if view.restarts or view.slurm.nodes or (view.slurm.node_seconds or 0) > 0:
        return None  # it ran, so somebody cancelled this very job
    for name in view.job.depends:
        parent = by_name.get(name)
        if parent is None or parent.state in (DONE, *LIVE):
            continue
        return (_culprit(parent, by_name) or parent) if parent.state == CANCELLED else parent
    return None


def hours_text(views: list[JobView]) -> str:
    """`12.50 GPU-hours` of the whole run; "" without accounting."""
    known = [view.gpu_hours for view in views if view.gpu_hours is not None]
    return f"{sum(known):.2f} {_unit(views)}" if known else ""


def _unit(views: list[JobView]) -> str:
    return "GPU-hours" if any(view.job.gpus for view in views) else "node-hours"


def views_text(views: list[JobView]) -> str:
    """One row per job."""
    unit = _unit(views)
    rows = []
    for view in views:
        text = view.note or describe(view.status) if view.state == RUNNING else view.note
        if view.state == RUNNING and not text:
            text = "starting"
        rows.append(
            (
                view.job.name,
                view.state,
                view.job_id,
                view.slurm.nodes or f"({view.job.nodes})",
                str(view.restarts) if view.restarts else "",
                "" if view.gpu_hours is None else f"{view.gpu_hours:.2f}",
                text,
            )
        )
    header = ("job", "state", "job id", "nodes", "restarts", unit)
    lines = table(header, [row[:-1] for row in rows]).splitlines()
    return "\n".join([*lines[:2], *(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines[2:], rows))])
