"""`list`, `status`, `logs`, `report`, `cancel` and `clean`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from jet_launcher.clean import removable, remove, size_of
from jet_launcher.cluster_launch import refuse_live_jobs
from jet_launcher.exit_codes import DONE, FAILED
from jet_launcher.local import ROOT
from jet_launcher.logs import show_log
from jet_launcher.processes import worker_environment
from jet_launcher.progress import describe, describe_end
from jet_launcher.remote import remote_of
from jet_launcher.run_directory import RunDirectory, find_run, list_runs
from jet_launcher.slurm.commands import cluster_cancel, cluster_logs, cluster_status
from jet_launcher.slurm.overview import job_views, run_word
from jet_launcher.slurm.record import read_record
from jet_launcher.slurm.state import UNKNOWN, NoAnswer
from jet_launcher.stage_status import DONE as STAGE_DONE
from jet_launcher.stage_status import RUNNING, read_run, run_state
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate_text import format_bytes, table
from megatron_jet.configs.lock import lock_holder

CANCEL_TIMEOUT = 600.0  # seconds a worker may take to save


def list_command(root: Path, as_json: bool) -> int:
    """All runs under `root`."""
    rows, silence = [], ""
    for run in list_runs(root):
        try:
            statuses, recipe = read_run(run), run.config().recipe
            try:
                state = state_of(run, ask_slurm=not silence)
            except NoAnswer as error:
                state, silence = UNKNOWN, error.reason
        except UserError as error:
            # One run of an older version must not hide the others.
            rows.append(
                {"id": run.id, "recipe": None, "state": "unreadable", "done": 0, "stages": 0, "error": str(error)}
            )
            continue
        done = sum(status.state == STAGE_DONE for status in statuses)
        updated = max((status.updated or 0.0 for status in statuses), default=0.0)
        rows.append(
            {"id": run.id, "recipe": recipe, "state": state, "done": done, "stages": len(statuses), "updated": updated}
        )
    if silence:
        print(f"Slurm does not answer ({silence})", file=sys.stderr)
    if as_json:
        print(json.dumps({"schema_version": 1, "runs": rows}, indent=2))
    elif not rows:
        print(f"no runs in {root}/; start one with: python launcher/postnas.py run tiny")
    else:
        cells = [
            (row["id"], row["recipe"] or "?", row["state"], f"{row['done']}/{row['stages']}", _ago(row.get("updated")))
            for row in rows
        ]
        print(table(("run", "recipe", "state", "stages", "last change"), cells))
    return DONE


def status_command(run_id: str, root: Path, as_json: bool) -> int:
    """Stages of one run."""
    run = find_run(run_id, root)
    remote, record = remote_of(run), read_record(run)
    if remote is not None:
        return remote.forward("status", *(["--json"] if as_json else []))
    if record is not None and record.jobs:
        return cluster_status(run, record, as_json)
    statuses = read_run(run)
    state = run_state(run, statuses)
    if as_json:
        body = {
            "schema_version": 1,
            "run": str(run.path),
            "state": state,
            "stages": [status.to_dict() for status in statuses],
        }
        print(json.dumps(body, indent=2))
        return DONE
    print(f"{run.path}: {state}")
    width = max(len(status.stage) for status in statuses)
    for status in statuses:
        text = f"running: {describe(status)}" if status.state == RUNNING else describe_end(status)
        print(f"  {status.stage.ljust(width)}  {text.removesuffix(': ')}")
    if record is not None and state != RUNNING:
        print(f"no job of it is at {record.name} yet; submit with: python launcher/postnas.py resume {run.path}")
    if run.report_file.is_file():
        print(f"report: {run.report_file}")
    return DONE


def logs_command(run_id: str, stage: str | None, follow: bool, root: Path) -> int:
    """Log of a stage."""
    run = find_run(run_id, root)
    remote, record = remote_of(run), read_record(run)
    try:
        if remote is not None:
            return remote.forward("logs", *([stage] if stage else []), *(["-f"] if follow else []))
        if record is not None and record.jobs:
            return cluster_logs(run, record, stage, follow, sys.stdout)
        show_log(run, stage, follow, sys.stdout)
    except (KeyboardInterrupt, BrokenPipeError):
        # Leaving `logs -f`, or a pager that was closed, is the normal end.
        sys.stderr.close()
    return DONE


def report_command(run_id: str, root: Path) -> int:
    """Write the report of a run, finished or not."""
    run = find_run(run_id, root)
    remote = remote_of(run)
    if remote is not None:
        return remote.forward("report")
    command = [sys.executable, "-m", "megatron_jet.evaluation.report.build", str(run.path)]
    result = subprocess.run(command, env=worker_environment(1, ROOT), check=False)
    return DONE if result.returncode == 0 else FAILED


def cancel_command(run_id: str, root: Path) -> int:
    """Stop a run: its worker saves and leaves."""
    run = find_run(run_id, root)
    holder = lock_holder(run.lock_file)
    remote, record = remote_of(run), read_record(run)
    if remote is not None:
        return remote.forward("cancel")
    if record is not None and record.jobs and holder is None:
        return cluster_cancel(run, record)
    if holder is None:
        print(f"{run.id} is not running")
        return DONE
    if holder.host != socket.gethostname():
        raise UserError(f"{run.id} runs on {holder.host} (process {holder.pid}); cancel it there")
    if holder.pid <= 0:
        raise UserError(f"{run.id}: cannot tell which process runs it ({run.lock_file} is unreadable)")
    os.kill(holder.pid, signal.SIGTERM)
    deadline = time.monotonic() + CANCEL_TIMEOUT
    while lock_holder(run.lock_file) is not None:
        if time.monotonic() > deadline:
            raise UserError(f"{run.id}: process {holder.pid} is still there after {CANCEL_TIMEOUT:.0f} s")
        time.sleep(0.1)
    print(f"{run.id} stopped; continue with: python launcher/postnas.py resume {run.id}")
    return DONE


def clean_command(run_id: str, root: Path, everything: bool, dryrun: bool) -> int:
    """Remove checkpoints that nothing needs any more, or the whole run."""
    run = find_run(run_id, root)
    remote = remote_of(run)
    if remote is not None:
        return remote.forward("clean", *(["--all"] if everything else []), *(["--dryrun"] if dryrun else []))
    refuse_live_jobs(run)
    freed = 0
    for path in removable(run, everything):
        size = size_of(path)
        freed += size
        print(f"{'would remove' if dryrun else 'removing'} {path} ({format_bytes(size)})")
        if not dryrun:
            remove(path)
    print(f"{format_bytes(freed)} {'would be freed' if dryrun else 'freed'}")
    return DONE


def state_of(run: RunDirectory, ask_slurm: bool = True) -> str:
    """One word for a run, wherever it is.

    Args:
        ask_slurm: no: `unknown` for a run on a cluster. A silent Slurm takes long to say nothing.

    Raises:
        NoAnswer: the run is on a cluster and Slurm is silent.
    """
    if remote_of(run) is not None:
        return "remote"
    record = read_record(run)
    if record is None or not record.jobs:
        return run_state(run, read_run(run))
    return run_word(job_views(run, record)) if ask_slurm else UNKNOWN


def _ago(moment: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)) if moment else "-"
