"""Where a run goes: to a cluster, back to the cluster it was on, or nowhere because its jobs are still in a queue."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_launcher.clusters import find_cluster, load_cluster, read_cluster, ssh_tunnel
from jet_launcher.exit_codes import DONE, INTERRUPTED
from jet_launcher.forecast import check_space, disk_needed
from jet_launcher.options import LaunchOptions, check_inputs, data_notes, inputs_problem
from jet_launcher.prefetch import refuse_missing
from jet_launcher.remote import launch_remotely
from jet_launcher.run_directory import RunDirectory, check_directory, check_upstream_results, open_run, safe_name
from jet_launcher.slurm.launch import Target, dry_run, live_jobs, node_path, submit_run, wait_for
from jet_launcher.slurm.overview import run_word, shown_views
from jet_launcher.slurm.record import read_record
from jet_launcher.slurm.scripts import check_mounts
from jet_launcher.slurm.taken import Interrupted
from jet_launcher.usage import UsageError, usage_errors
from megatron_jet.configs.cluster import TunnelConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.run_estimate import estimate_run
from megatron_jet.configs.teacher_source import expand_paths, teacher_model


@dataclass(frozen=True)
class RemoteTarget:
    """A cluster whose login node is reached by SSH.

    Attributes:
        description: the cluster file as it is written; its `${VAR}` belong to the login node.
    """

    name: str
    tunnel: TunnelConfig
    description: dict[str, Any]


def load_target(name: str) -> Target | RemoteTarget | None:
    """The cluster of this name or file; None when it is this machine."""
    tunnel = ssh_tunnel(name)
    if tunnel is not None:
        return RemoteTarget(name, tunnel, read_cluster(name)[1])
    cluster = load_cluster(name)
    return None if cluster.scheduler == "local" else Target(name, cluster)


def cluster_of(run: RunDirectory, asked: str | None) -> Target | RemoteTarget | None:
    """Where a run is to be continued: as asked, or where it was before, as its cluster file is now."""
    if asked is not None:
        return load_target(asked)
    record = read_record(run)
    if record is None:
        return None
    try:
        find_cluster(record.name)
    except UserError as gone:
        print(f"{run.id}: goes on with its copy of the cluster file ({gone})", file=sys.stderr)
        return Target(record.name, record.cluster)
    return load_target(record.name)


def launch_on_cluster(
    config: RunConfig, stages: tuple[str, ...], options: LaunchOptions, target: Target | RemoteTarget
) -> int:
    """`run` on a cluster. Returns the exit code."""
    if isinstance(target, RemoteTarget):
        return launch_remotely(config, stages, options, target.tunnel, target.description)
    root = Path(target.cluster.job_dir) if target.cluster.job_dir else options.root
    if options.dryrun:
        return _dry_run(config, stages, options, target, root)
    with usage_errors():
        config = expand_paths(config)
    if target.cluster.offline:
        refuse_missing(config)
    check_inputs(config)
    check_upstream_results(config, stages, options.output)
    run = open_run(config, options.output, root)
    _make_findable(run, options.root)
    return continue_on_cluster(run, config, stages, options, target)


def continue_on_cluster(
    run: RunDirectory,
    config: RunConfig,
    stages: tuple[str, ...],
    options: LaunchOptions,
    target: Target | RemoteTarget,
) -> int:
    """Submit what is missing of a run, and wait for it if asked. Returns the exit code."""
    if isinstance(target, RemoteTarget):
        raise UsageError(f"{run.id} is here, but cluster '{target.name}' is behind SSH; start a new run there")
    stream = sys.stderr if options.as_json else sys.stdout
    check_upstream_results(config, stages, run.path)
    teacher = check_inputs(config)
    todo = [stage for stage in stages if not (run.stage(stage) / "result.json").is_file()]
    check_space(disk_needed(estimate_run(config, teacher), todo), run)
    for note in data_notes(config, todo):
        print(f"note: {note}", file=stream)
    try:
        record = submit_run(run, config, teacher, stages, target, stream)
    except Interrupted as error:
        print(f"error: {error}", file=sys.stderr)
        return INTERRUPTED
    code = wait_for(run, stream) if options.wait else DONE
    if options.as_json:
        views, silence = shown_views(run, record)
        summary = {"run": str(run.path), "state": run_word(views), "exit_code": code, "slurm_error": silence or None}
        print(json.dumps({"schema_version": 1, **summary, "jobs": [view.to_dict() for view in views]}, indent=2))
    return code


def refuse_live_jobs(run: RunDirectory) -> None:
    """Raise UserError when the run has jobs in a queue, or may have: two workers would write the same files."""
    live = live_jobs(read_record(run))
    if live:
        names = ", ".join(live)
        raise UserError(f"{run.id}: jobs are in the queue or running ({names}); `cancel {run.id}` them first")


def _dry_run(config: RunConfig, stages: tuple[str, ...], options: LaunchOptions, target: Target, root: Path) -> int:
    try:
        config = expand_paths(config)
        missing = inputs_problem(config)
        check_mounts(config, target.cluster)
    except UserError as error:
        missing = str(error)
    output = options.output or root / f"{safe_name(config.recipe)}-TIME"
    run = RunDirectory(output)
    if options.output is not None:
        check_directory(config, run)
    return dry_run(run, config, teacher_model(config.teacher), stages, target, options.as_json, missing)


def _make_findable(run: RunDirectory, root: Path) -> None:
    """A link in `runs/`, so that the ID works for runs in the cluster's job directory, too."""
    link = root / run.id
    if run.path.resolve().parent == root.resolve() or link.exists() or link.is_symlink():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        link.symlink_to(node_path(run))
    except OSError:
        pass  # the path works as ID
