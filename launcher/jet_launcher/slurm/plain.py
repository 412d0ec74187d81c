"""One stage as a Slurm job without NeMo-Run: what slurm/postnas.sbatch does on the login node.

    slurm/postnas.sbatch CLUSTER RUN_DIR STAGE[:CANDIDATE] [RECIPE [key.sub=value ...]]

Prints the job ID. The job is in the run's record like those of `run`: status, logs, cancel and clean know it.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from jet_launcher.cluster_launch import load_target
from jet_launcher.exit_codes import DONE, FAILED, INTERRUPTED, USAGE
from jet_launcher.options import check_inputs
from jet_launcher.run_directory import RunDirectory, find_run, opened, plan_run
from jet_launcher.signals import caught_signals
from jet_launcher.slurm.ask import no_id, number_of, scheduler_environment, submitted_id
from jet_launcher.slurm.experiment import check_path, check_sbatch
from jet_launcher.slurm.graph import Job, JobGraph, build_graph
from jet_launcher.slurm.launch import ROOT, Target, job_place, live_jobs, node_path, warn_stuck
from jet_launcher.slurm.package import ship_code
from jet_launcher.slurm.record import SubmissionLog, read_record
from jet_launcher.slurm.scripts import JobPlace, check_mounts, sbatch_options, setup_lines, write_scripts
from jet_launcher.slurm.taken import Interrupted, Taken
from megatron_jet.configs.candidates import split_target
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UsageError, UserError, usage_errors
from megatron_jet.configs.files import describe_os_error, write_text
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.teacher_source import expand_paths


def submit_stage(cluster_name: str, run_dir: str, target: str, recipe: list[str], extra: list[str]) -> str:
    """Ship the code, write prelude and step script, and submit. Returns the job ID.

    Args:
        target: `stage`, or `stage:candidate`.
        recipe: its name and overrides, to make a run directory that does not exist; a refusal leaves none.
        extra: options of sbatch.

    Raises:
        UserError: unknown cluster, stage or candidate, a run directory that is missing or holds another config, the
            same stage is in the queue already, or sbatch refuses.
        Interrupted: a signal during submission; the job was cancelled.
    """
    chosen = load_target(cluster_name)
    if not isinstance(chosen, Target):
        raise UsageError(f"cluster '{cluster_name}' does not run sbatch here; give one with Slurm and a local tunnel")
    run, config = _run(run_dir, recipe)
    check_path("run directory", node_path(run))
    check_sbatch()
    graph, job = _job(config, target, chosen.cluster)
    check_mounts(config, chosen.cluster)
    try:
        with opened(run, config), run.locked():
            live = live_jobs(read_record(run)).get(job.name)
            if live is not None:
                raise UserError(
                    f"{run.id}: {job.name} is in the queue or running (job {live}); `cancel {run.id}` first"
                )
            code = ship_code(ROOT, node_path(run))
            place = job_place(run, chosen.cluster, code.path)
            prelude = place.cluster_dir / "plain" / f"{job.name}.sh"
            write_scripts([job], chosen.cluster, place)
            write_text(prelude, setup_lines(job, chosen.cluster, place) + "\n")
            command = [*_options(run, job, chosen.cluster, place), *extra]
            log = SubmissionLog(run, chosen.name, chosen.cluster, graph, place, code)
            command += [str(ROOT / "slurm" / "postnas.sbatch"), "--in-job", str(prelude)]
            return _sbatch(command, job, log, chosen.cluster.clusters or "")
    except OSError as error:
        raise UserError(describe_os_error(error, run.path)) from None


def _sbatch(arguments: list[str], job: Job, log: SubmissionLog, cluster: str) -> str:
    """Submit and record. Returns the job ID."""
    with caught_signals() as interrupts, scheduler_environment():
        taken = Taken(None, None, log.keep, interrupts)
        try:
            with taken.one_more() as add:
                command = ["sbatch", "--parsable", "--requeue", *arguments]
                done = subprocess.run(command, capture_output=True, text=True, errors="replace")
                if done.returncode:
                    raise UserError(" ".join(done.stderr.split()) or f"sbatch ended with {done.returncode}")
                job_id = submitted_id(done.stdout)
                if job_id is None:
                    raise UserError(no_id(done.stdout))
                add(job.name, job_id)
            taken.check()
        except BaseException as error:
            own = arguments[-1]  # the prelude: of this run and job alone
            left = taken.take_back(lambda command: command.split()[-1:] == [own], cluster)
            kind = Interrupted if isinstance(error, Interrupted) else UserError
            raise kind(f"submission failed: {error}; {left}") from None
    warn_stuck(taken.submitted)
    return number_of(taken.submitted.job_ids[job.name])


def _run(run_dir: str, recipe: list[str]) -> tuple[RunDirectory, RunConfig]:
    if not recipe:
        run = find_run(run_dir)
        return run, run.config()
    with usage_errors():
        config = expand_paths(apply_overrides(load_recipe(recipe[0]), recipe[1:]))
    return plan_run(config, Path(run_dir)), config


def _job(config: RunConfig, target: str, cluster: ClusterConfig) -> tuple[JobGraph, Job]:
    stage, _ = split_target(target)
    with usage_errors():
        config.stage(stage)
    graph = build_graph(config, check_inputs(config), (stage,), cluster)
    jobs = {job.target: job for job in graph.jobs}
    if target not in jobs:
        raise UsageError(f"'{target}' is no job of this run; known: {', '.join(jobs)}")
    return graph, jobs[target]


def _options(run: RunDirectory, job: Job, cluster: ClusterConfig, place: JobPlace) -> list[str]:
    place.log_dir(job).mkdir(parents=True, exist_ok=True)
    options = {
        **sbatch_options(job, cluster),
        "job-name": f"{run.id}.{job.name}",
        "output": str(place.log_dir(job) / f"{job.name}.%j.batch.log"),
    }
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]


def _extra_options() -> list[str]:
    try:
        return shlex.split(os.environ.get("SBATCH_EXTRA", ""))
    except ValueError as error:
        raise UsageError(f"SBATCH_EXTRA: {error}") from None


def main(arguments: list[str]) -> int:
    """Command line. One `error:` line for bad input."""
    if len(arguments) < 3:
        print(__doc__, file=sys.stderr)
        return USAGE
    try:
        print(submit_stage(arguments[0], arguments[1], arguments[2], arguments[3:], _extra_options()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, UsageError):
            return USAGE
        return INTERRUPTED if isinstance(error, Interrupted) else FAILED
    return DONE
