"""`run` and `resume` on a cluster: check, ship the code, submit what is missing, and wait if asked."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from jet_launcher.exit_codes import DONE, FAILED, INTERRUPTED
from jet_launcher.provenance import record_launch
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm import state as slurm
from jet_launcher.slurm.ask import number_of
from jet_launcher.slurm.experiment import batch_scripts, submit
from jet_launcher.slurm.graph import JobGraph, build_graph, graph_text
from jet_launcher.slurm.overview import JobView, finished, run_word, shown_views, stuck_reason, views_text
from jet_launcher.slurm.package import ship_code
from jet_launcher.slurm.record import ClusterRecord, SubmissionLog, read_record
from jet_launcher.slurm.scripts import JobPlace, check_mounts, default_python, step_script
from jet_launcher.slurm.taken import Submitted
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import describe_os_error
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig

ROOT = Path(__file__).resolve().parents[3]
POLL_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Target:
    """A cluster by the name it was asked for."""

    name: str
    cluster: ClusterConfig


def job_place(run: RunDirectory, cluster: ClusterConfig, code: Path) -> JobPlace:
    """Paths of a submission from here."""
    worker = os.environ.get("JET_WORKER", JobPlace.worker)
    return JobPlace(node_path(run), code, working_directory(), default_python(cluster, sys.executable), worker)


def working_directory() -> Path:
    """The current directory as the shell shows it: links lead elsewhere on some nodes."""
    shown = Path(os.environ.get("PWD", ""))
    try:
        return shown if shown.is_absolute() and shown.samefile(Path.cwd()) else Path.cwd()
    except OSError:
        return Path.cwd()


def node_path(run: RunDirectory) -> Path:
    """The run directory as nodes get it: with links as they were written, but for the one that `run` makes in runs/."""
    path = working_directory() / run.path
    target = Path(os.readlink(path)) if path.is_symlink() else path
    return target if target.is_absolute() and target.name == path.name else path


def submit_run(
    run: RunDirectory, config: RunConfig, teacher: ModelConfig, stages: tuple[str, ...], target: Target, stream: TextIO
) -> ClusterRecord:
    """Submit the jobs of `stages` that are neither finished nor in the queue.

    Raises:
        UserError: the jobs do not fit the cluster, sbatch refuses one of them, or somebody else is submitting.
        NoAnswer: squeue fails, so nobody knows what is missing.
        Interrupted: a signal during submission.
    """
    graph = build_graph(config, teacher, stages, target.cluster)
    try:
        # Held before anybody asks what is in the queue: two `resume` at once would both find the same jobs missing.
        with run.locked():
            return _submit_missing(run, config, stages, graph, target, stream)
    except OSError as error:
        raise UserError(describe_os_error(error, run.path)) from None


def _submit_missing(
    run: RunDirectory, config: RunConfig, stages: tuple[str, ...], graph: JobGraph, target: Target, stream: TextIO
) -> ClusterRecord:
    check_mounts(config, target.cluster)
    record = read_record(run)
    live = live_jobs(record)
    missing = graph.without([job.name for job in graph.jobs if finished(run, job) or job.name in live])
    if not missing.jobs:
        waiting = f"; {len(live)} jobs are in the queue" if live else ""
        print(f"{run.id}: nothing to submit, everything else is done{waiting}", file=stream)
        if record is None or not record.jobs:
            raise UserError(f"{run.id} is finished already and has no record of a cluster; see `status {run.id}`")
        return record
    for note in graph.notes:
        print(f"note: {note}", file=stream)
    waits_for = {
        job.name: [number_of(live[name]) for name in graph_job(graph, job.name).depends if name in live]
        for job in missing.jobs
    }
    record_launch(run, config, stages)
    code = ship_code(ROOT, node_path(run))
    place = job_place(run, target.cluster, code.path)
    log = SubmissionLog(run, target.name, target.cluster, missing, place, code)
    submitted = submit(missing, target.cluster, place, run.id, {k: v for k, v in waits_for.items() if v}, log.keep)
    log.note_launch(submitted)
    print(f"{run.id}: {len(missing.jobs)} jobs submitted to {target.name}", file=stream)
    rows = ((job.name, submitted.job_ids[job.name]) for job in missing.jobs)
    print("\n".join(f"  {job_id}  {name}" for name, job_id in rows), file=stream)
    print(
        f"code: {code.files} files, {place.code}\n"
        f"NeMo-Run: NEMORUN_HOME={submitted.home} nemo experiment status {submitted.experiment}\n"
        f"see: python launcher/postnas.py status {run.path}",
        file=stream,
        flush=True,
    )
    warn_stuck(submitted)
    record = read_record(run)
    assert record is not None
    return record


def graph_job(graph: JobGraph, name: str):
    """The job of this name."""
    return next(job for job in graph.jobs if job.name == name)


def live_jobs(record: ClusterRecord | None) -> dict[str, str]:
    """IDs of this run's jobs that wait or run, by name. Raises NoAnswer when squeue fails."""
    if record is None:
        return {}
    states = slurm.query_jobs(record.all_job_ids, record.since)
    rows = [row for submission in record.submissions for row in submission["jobs"]]
    return {row["job"]["name"]: row["job_id"] for row in rows if states[row["job_id"]].live}


def warn_stuck(submitted: Submitted) -> None:
    """Say on stderr which of these jobs Slurm will not start, as far as it knows by now."""
    try:
        states = slurm.query_jobs(submitted.job_ids.values())
    except slurm.NoAnswer:
        return  # they are submitted; `status` will tell
    for name, job_id in submitted.job_ids.items():
        why = stuck_reason(states[job_id])
        if why:
            print(f"warning: {name} (job {job_id}) waits for {states[job_id].reason}: {why}", file=sys.stderr)


def wait_for(run: RunDirectory, stream: TextIO, poll_seconds: float = POLL_SECONDS) -> int:
    """Wait until no job of the run is left in the queue. Returns the exit code: 0 only if every job has its result."""
    record = read_record(run)
    assert record is not None
    said: dict[str, tuple[str, int]] = {}
    silent = False
    try:
        while True:
            views, silence = shown_views(run, record)
            if not silence:
                _say_changes(views, said, stream)
                if not any(view.slurm.live for view in views):
                    return conclude(run, views, stream)
            elif not silent:
                print(f"{_now()} Slurm does not answer ({silence}); still waiting", file=stream, flush=True)
            silent = bool(silence)
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        print(f"no longer waiting; the jobs go on: python launcher/postnas.py status {run.path}", file=sys.stderr)
        return INTERRUPTED


def conclude(run: RunDirectory, views: list[JobView], stream: TextIO) -> int:
    """Last word about a run that has come to its end. Returns the exit code."""
    if run_word(views) == slurm.DONE:
        print(f"{run.id}: done", file=stream)
        return DONE
    print(views_text(views), file=stream)
    bad = next((view for view in views if view.state == slurm.FAILED), None) or next(
        view for view in views if view.state != slurm.DONE
    )
    print(
        f"error: {bad.job.name} {bad.state}{f' ({bad.note})' if bad.note else ''}; "
        f"log: python launcher/postnas.py logs {run.path} {bad.job.name}; "
        f"continue with: python launcher/postnas.py resume {run.path}",
        file=sys.stderr,
    )
    return FAILED


def _say_changes(views: list[JobView], said: dict[str, tuple[str, int]], stream: TextIO) -> None:
    for view in views:
        stuck = stuck_reason(view.slurm)
        if stuck and said.get(f"{view.job.name} stuck") != (stuck, 0):
            print(
                f"warning: {view.job.name} (job {view.job_id}) waits for {view.slurm.reason}: {stuck}", file=sys.stderr
            )
        said[f"{view.job.name} stuck"] = (stuck, 0)
        key = (view.state, view.restarts)
        if said.get(view.job.name) != key and not (view.job.name not in said and view.state == slurm.PENDING):
            again = f" (restart {view.restarts})" if view.restarts else ""
            where = f" on {view.slurm.nodes}" if view.state == slurm.RUNNING and view.slurm.nodes else ""
            note = f": {view.note}" if view.note and view.state != slurm.RUNNING else ""
            print(f"{_now()} {view.job.name}: {view.state}{again}{where}{note}", file=stream, flush=True)
        said[view.job.name] = key


def _now() -> str:
    return time.strftime("%H:%M:%S")


def dry_run(
    run: RunDirectory,
    config: RunConfig,
    teacher: ModelConfig,
    stages: tuple[str, ...],
    target: Target,
    as_json: bool,
    missing: str | None,
) -> int:
    """Print the graph and every script. Nothing is written, no Slurm is needed."""
    graph = build_graph(config, teacher, stages, target.cluster)
    todo = graph.without([job.name for job in graph.jobs if finished(run, job)])
    place = job_place(run, target.cluster, node_path(run) / "code" / "<hash>")
    scripts = batch_scripts(todo, target.cluster, place, run.id) if todo.jobs else {}
    if as_json:
        plan = {
            "schema_version": 1,
            "run": str(run.path),
            "cluster": target.name,
            "jobs": [{**dataclasses.asdict(job), "layout": job.layout.to_dict()} for job in todo.jobs],
            "estimate": [stage.to_dict() for stage in graph.estimate.stages],
            "scripts": scripts,
            "steps": {job.name: step_script(job, target.cluster, place) for job in todo.jobs},
            "missing": missing,
        }
        print(json.dumps(plan, indent=2))
        return DONE
    print(f"would submit {len(todo.jobs)} jobs to {target.name} from {run.path}\n")
    print(graph_text(graph))
    for job in todo.jobs:
        after = f" --dependency=afterok:{':'.join(f'<{name}>' for name in job.depends)}" if job.depends else ""
        print(f"\n{'=' * 20} {job.name}: sbatch --requeue{after} <<'EOF'\n{scripts[job.name]}\nEOF")
        print(f"{'-' * 20} {place.step_script(job)}\n{step_script(job, target.cluster, place)}")
    if missing:
        print(f"not ready here: {missing}")
    print("nothing was written, nothing was submitted (--dryrun)")
    return DONE
