"""Submitting a job graph as a NeMo-Run experiment. The only file that imports NeMo-Run, and only when it is called."""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from jet_launcher.signals import caught_signals
from jet_launcher.slurm.ask import no_id, number_of, scheduler_environment, submitted_id
from jet_launcher.slurm.graph import Job, JobGraph
from jet_launcher.slurm.scripts import (
    JobPlace,
    container_mounts,
    sbatch_options,
    setup_lines,
    srun_options,
    write_scripts,
)
from jet_launcher.slurm.taken import Interrupted, Submitted, Taken
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import home_expanded

# NeMo-Run replaces this in every script it writes without a container.
REPLACED_PATH = "/nemo_run"
# Options that NeMo-Run's executor has a field for; the others pass through its additional_parameters.
_FIELDS = {
    "account", "partition", "qos", "constraint", "exclude", "nodes", "ntasks-per-node", "cpus-per-task", "mem",
    "exclusive", "time", "signal", "gpus-per-node", "gres", "comment", "network", "segment",
}  # fmt: skip


def submit(
    graph: JobGraph,
    cluster: ClusterConfig,
    place: JobPlace,
    title: str,
    waits_for: Mapping[str, list[str]],
    keep: Callable[[Submitted], None],
) -> Submitted:
    """Write the step scripts and submit every job, or none.

    Args:
        title: of the experiment; Slurm's job names are `title.job`.
        waits_for: by job name, IDs of jobs of an earlier submission that it also depends on.
        keep: called whenever Slurm has taken one more job, with all so far.

    Raises:
        UserError: NeMo-Run is not installed, or sbatch refused a job (those submitted before are cancelled).
        Interrupted: Ctrl-C, SIGTERM or a closed terminal (they are cancelled, too).
    """
    check_paths(place)
    check_sbatch()
    write_scripts(graph.jobs, cluster, place)
    with caught_signals(_say_stopping) as interrupts, scheduler_environment(), _nemo_run(nemo_home()) as run:
        experiment, log = _experiment(run, graph, cluster, place, title, waits_for)
        taken = Taken(experiment._id, nemo_home(), keep, interrupts)
        try:
            with log, experiment, _read_answers(run) as job_ids:
                _add_jobs(run, experiment, graph, cluster, place, waits_for)
                _tell(experiment, taken, job_ids)
                experiment.run(detach=True)
            taken.check()
        except BaseException as error:
            scripts = f"{experiment._exp_dir}/"
            left = taken.take_back(lambda command: command.startswith(scripts), cluster.clusters or "")
            kind = Interrupted if isinstance(error, Interrupted) else UserError
            raise kind(f"submission failed: {_reason(error)}; {left}") from None
        return taken.submitted


def batch_scripts(graph: JobGraph, cluster: ClusterConfig, place: JobPlace, title: str) -> dict[str, str]:
    """The script that NeMo-Run would submit for every job, by name. Writes to a temporary directory only."""
    check_paths(place)
    home = nemo_home()
    with tempfile.TemporaryDirectory() as scratch, _nemo_run(Path(scratch)) as run:
        experiment, log = _experiment(run, graph, cluster, place, title, {})
        with log, experiment:
            _add_jobs(run, experiment, graph, cluster, place, {})
            experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment._exp_dir)
        return {
            job.name: (folder / f"{job.name}_sbatch.sh").read_text().replace(scratch, str(home)) for job in graph.jobs
        }


def nemo_home() -> Path:
    """NEMORUN_HOME, or NeMo-Run's default. Must be on the shared file system: logs go there."""
    return home_expanded(os.environ.get("NEMORUN_HOME", "~/.nemo_run"), "NEMORUN_HOME").absolute()


def check_sbatch() -> None:
    """Raise UserError where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError("submission failed: there is no sbatch here; this has to run on a login node of the cluster")


def check_paths(place: JobPlace) -> None:
    """Raise UserError for a path that NeMo-Run would write into a script unquoted or rewritten."""
    for what, path in (("run directory", place.run_dir), ("NEMORUN_HOME", nemo_home())):
        check_path(what, path)
        if REPLACED_PATH in str(path):
            raise UserError(f"{what} {path}: NeMo-Run cannot work in a path with '{REPLACED_PATH}'; choose another one")


def check_path(what: str, path: Path) -> None:
    """Raise UserError for a path with characters that mean something to a shell or to Slurm."""
    if not re.fullmatch(r"[A-Za-z0-9_./@+,=~-]+", str(path)):
        raise UserError(f"{what} {path}: on a cluster its path may hold letters, digits and _ . / @ + , = ~ - only")


def executor_of(run: ModuleType, job: Job, cluster: ClusterConfig, place: JobPlace, title: str, after: list[str]):
    """NeMo-Run's executor of one job.

    Args:
        run: the module nemo_run.
        after: IDs of jobs outside of this experiment that must succeed first.
    """
    options = sbatch_options(job, cluster)
    fields = {key.replace("-", "_"): value for key, value in options.items() if key in _FIELDS}
    extra = {key: value for key, value in options.items() if key not in _FIELDS | {"open-mode"}}
    if any(REPLACED_PATH in str(value) for value in options.values()):
        raise UserError(f"{job.name}: NeMo-Run cannot pass on an sbatch option with '{REPLACED_PATH}' in its value")
    if after and not job.depends:
        extra["dependency"] = ":".join(["afterok", *after])
    container = cluster.container
    return run.SlurmExecutor(
        **{"account": None, **fields},
        job_name_prefix=f"{title}.",
        launcher=None,
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=""),
        retries=0,  # slurm/job.sh decides what is queued again
        container_image=container.image if container else None,
        container_mounts=container_mounts(cluster, place),
        srun_args=srun_options(),
        setup_lines=setup_lines(job, cluster, place),
        additional_parameters=extra,
        dependency_type=":".join(["afterok", *after]) if job.depends else "afterok",
        poll_estimated_start_time=False,
    )


def _experiment(run, graph: JobGraph, cluster, place: JobPlace, title: str, waits_for):
    experiment = run.Experiment(
        title,
        executor=executor_of(run, graph.jobs[0], cluster, place, title, []),
        log_level="WARNING",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )
    # Quiet now, but not for ever: it is stored, and would silence `nemo experiment status` later.
    experiment.clean_mode = False
    return experiment, contextlib.redirect_stdout(io.StringIO())


def _add_jobs(run, experiment, graph: JobGraph, cluster: ClusterConfig, place: JobPlace, waits_for) -> None:
    for job in graph.jobs:
        experiment.add(
            run.Script(path=str(place.step_script(job))),
            executor=executor_of(run, job, cluster, place, experiment._title, waits_for.get(job.name, [])),
            name=job.name,
            dependencies=list(job.depends),
        )


def _tell(experiment, taken: Taken, job_ids: Mapping[str, str]) -> None:
    """Let `taken` know every job as soon as Slurm has it: NeMo-Run's experiment tells at the end only."""
    start = experiment._runner.run

    def started(*arguments, cfg, **options):
        with taken.one_more() as add:
            handle = start(*arguments, cfg=cfg, **options)
            add(cfg.job_name, job_ids[handle.partition("://")[2].split("/")[1]])
        return handle

    experiment._runner.run = started


@contextlib.contextmanager
def _read_answers(run: ModuleType) -> Iterator[dict[str, str]]:
    """Gives the IDs of the jobs submitted meanwhile, by their number.

    NeMo-Run takes all that sbatch prints for the number, and hands it to the shell with the next job. Here it gets the
    number alone, or an error before anything else is submitted.
    """
    job_ids: dict[str, str] = {}
    call = run.LocalTunnel.run

    def checked(tunnel, command: str, *arguments, **options):
        result = call(tunnel, command, *arguments, **options)
        if command.split(maxsplit=1)[0] == "sbatch":
            job_id = submitted_id(result.stdout)
            if job_id is None:
                raise UserError(no_id(result.stdout))
            result.stdout = number_of(job_id)
            job_ids[result.stdout] = job_id
        return result

    run.LocalTunnel.run = checked
    try:
        yield job_ids
    finally:
        run.LocalTunnel.run = call


def _say_stopping() -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        print("stopping: the jobs submitted so far are taken back", file=sys.stderr)


def _reason(error: BaseException) -> str:
    result = getattr(error, "result", None)
    text = getattr(result, "stderr", "") or str(error) or type(error).__name__
    return " ".join(text.split())[:500]


@contextlib.contextmanager
def _nemo_run(home: Path) -> Iterator[ModuleType]:
    """The module, imported with `home` as its NEMORUN_HOME: it reads the variable at import and keeps it."""
    if "nemo_run" in sys.modules:
        raise RuntimeError("nemo_run was imported before; one process submits once")
    before = os.environ.get("NEMORUN_HOME")
    os.environ["NEMORUN_HOME"] = str(home)
    try:
        import nemo_run

        yield nemo_run
    except ImportError as error:
        raise UserError(f"NeMo-Run cannot be imported ({error}); pip install 'megatron-jet[launch]'") from None
    finally:
        if before is None:
            os.environ.pop("NEMORUN_HOME")
        else:
            os.environ["NEMORUN_HOME"] = before
