"""`status`, `logs` and `cancel` of runs that went to a cluster."""

import json
import sys
import time
from pathlib import Path
from typing import TextIO

from jet_launcher.exit_codes import DONE
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm import state as slurm
from jet_launcher.slurm.ask import number_of
from jet_launcher.slurm.overview import JobView, hours_text, read_attempts, run_word, shown_views, views_text
from jet_launcher.slurm.record import ClusterRecord
from jet_launcher.usage import UsageError
from megatron_jet.configs.errors import UserError

FOLLOW_SECONDS = 1.0
STATE_SECONDS = 5.0  # Slurm's controller is shared; files are cheaper to look at than states
CANCEL_TIMEOUT = 600.0


def cluster_status(run: RunDirectory, record: ClusterRecord, as_json: bool) -> int:
    """Every job: state, job ID, nodes, restarts, hours, step, losses, time left."""
    views, silence = shown_views(run, record)
    if as_json:
        body = {"run": str(run.path), "state": run_word(views), "cluster": record.name, "slurm_error": silence or None}
        print(json.dumps({"schema_version": 1, **body, "jobs": [view.to_dict() for view in views]}, indent=2))
        return DONE
    last = record.submissions[-1]["experiment"]
    spent = f", {hours_text(views)} so far" if hours_text(views) else ""
    experiment = f" (NeMo-Run experiment {last})" if last else ""
    print(f"{run.path}: {run_word(views)} on {record.name}{spent}{experiment}")
    print(views_text(views))
    if silence:
        print(f"Slurm does not answer ({silence}): only what files in the run directory tell is shown")
    if run.report_file.is_file():
        print(f"report: {run.report_file}")
    return DONE


def cluster_cancel(run: RunDirectory, record: ClusterRecord) -> int:
    """scancel every job of the run that waits or runs, and wait until Slurm has ended them.

    Raises:
        UserError: Slurm does not answer or refuses, or a job does not end.
    """
    states = slurm.query_jobs(record.all_job_ids, record.since)
    live = [job_id for job_id, job in states.items() if job.live]
    if not live:
        print(f"{run.id} has no jobs in the queue")
        return DONE
    # Dependents first: one whose dependency ends well in this very moment must not start.
    slurm.cancel_jobs(reversed(live))
    ended = _ended(run, live)
    own = sum(job.state in (slurm.DONE, slurm.FAILED) for job in ended)
    before = f" ({own} had ended before)" if own else ""
    resume = f"python launcher/postnas.py resume {run.path}"
    print(f"{run.id}: {len(live) - own} jobs cancelled{before}; continue with: {resume}")
    return DONE


def _ended(run: RunDirectory, job_ids: list[str]) -> list[slurm.SlurmJob]:
    """The jobs once none of them waits or runs. A Slurm that is silent for a while is waited for."""
    deadline = time.monotonic() + CANCEL_TIMEOUT
    while True:
        try:
            jobs = list(slurm.query_jobs(job_ids).values())
        except slurm.NoAnswer:
            if time.monotonic() > deadline:
                raise
        else:
            if not any(job.live for job in jobs):
                return jobs
            if time.monotonic() > deadline:
                raise UserError(f"{run.id}: Slurm has not ended jobs {', '.join(job_ids)} in {CANCEL_TIMEOUT:.0f} s")
        time.sleep(FOLLOW_SECONDS)


def cluster_logs(run: RunDirectory, record: ClusterRecord, name: str | None, follow: bool, stream: TextIO) -> int:
    """Copy the log of a stage's or job's newest attempt to `stream`; every node that has one of its own in turn.

    With `follow`, go on until the job has ended, through its restarts; without a name, through all jobs of the run.

    Raises:
        UserError: no such stage or job, or nothing of it has started yet.
    """
    views, silence = shown_views(run, record)
    view = _chosen(run, record, views, name)
    positions: dict[Path, int] = {}
    _copy_new(log_files(run, record, view), positions, stream)
    checked = time.monotonic()
    while follow:
        if not silence and not view.slurm.live:
            _copy_new(log_files(run, record, view), positions, stream)
            if name is not None or not any(v.slurm.live for v in views):
                print(f"{view.job.name}: {view.state}{f' ({view.note})' if view.note else ''}", file=sys.stderr)
                return DONE
            running = [v for v in views if v.state == slurm.RUNNING and log_files(run, record, v)]
            if running:
                view = running[-1]
                print(f"==> {view.job.name} <==", file=stream)
        while time.monotonic() - checked < STATE_SECONDS:
            time.sleep(FOLLOW_SECONDS)
            _copy_new(log_files(run, record, view), positions, stream)
        views, silence = shown_views(run, record)
        checked = time.monotonic()
        view = next(v for v in views if v.job.name == view.job.name)
    return DONE


def log_files(run: RunDirectory, record: ClusterRecord, view: JobView) -> list[Path]:
    """Logs of a job's newest attempt that wrote something, one per node; before there is one, those of preflight and
    batch script."""
    folder, number = run.stage(view.job.stage) / "logs", number_of(view.job_id)
    attempts = read_attempts(run, view.job.name, view.job_id)
    for restart in sorted({attempt.restart for attempt in attempts}, reverse=True):
        found = sorted(folder.glob(f"{view.job.name}.{number}.{restart}.*.log"))
        if any(path.stat().st_size for path in found):  # on a full disk they are made and stay empty
            return found
    preflight = sorted((run.path / "cluster" / "preflight").glob(f"{number}.*/log.txt"))
    batch = record.batch_log(run, view.job, view.job_id)
    return [*preflight[-1:], *([batch] if batch.is_file() else [])]


def _chosen(run: RunDirectory, record: ClusterRecord, views: list[JobView], name: str | None) -> JobView:
    if name is not None:
        chosen = [view for view in views if name in (view.job.name, view.job.target, view.job.stage)]
        if not chosen:
            raise UsageError(f"{run.id} has no stage or job '{name}'; jobs: {', '.join(v.job.name for v in views)}")
    else:
        chosen = views
    started = [view for view in chosen if log_files(run, record, view)]
    if not started:
        states = ", ".join(f"{v.job.name} {v.state}{f' ({v.note})' if v.note else ''}" for v in chosen[:3])
        raise UserError(f"{run.id}: nothing to show yet: {states}")
    running = [view for view in started if view.state == slurm.RUNNING]
    exact = [view for view in started if name in (view.job.name, view.job.target)]
    return (
        exact or running or [max(started, key=lambda v: max(p.stat().st_mtime for p in log_files(run, record, v)))]
    )[-1]


def _copy_new(files: list[Path], positions: dict[Path, int], stream: TextIO) -> None:
    for path in files:
        if path not in positions and len(files) > 1:
            print(f"==> {path.name} <==", file=stream)
        position = positions.get(path, 0)
        with open(path, "rb") as log:
            log.seek(position)
            data = log.read()
        positions[path] = position + len(data)
        stream.write(data.decode(errors="replace"))
    stream.flush()
