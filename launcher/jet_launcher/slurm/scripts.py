"""What a Slurm job is told: sbatch options, the set-up lines of the batch script, and the script of every process.

Everything here is data turned into text. The logic of a job (signals, requeueing, preflight) is in slurm/job.sh and
slurm/step.sh, which the texts below source from the code that ships with the job.
"""

import hashlib
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jet_launcher.slurm.graph import Job
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import home_expanded, write_text
from megatron_jet.configs.run import RunConfig

EARLY_WARNING_SIGNAL = "USR1"
# After the first process of a step ends, the others may take this long to save and leave.
STEP_WAIT_SECONDS = 120


@dataclass(frozen=True)
class JobPlace:
    """Where the jobs of one submission find everything. All paths are on the shared file system.

    Attributes:
        run_dir: the run directory.
        code: the code that ships with the job.
        cwd: working directory of the processes; relative paths in a config start here.
        python: Python on a node: a path, or a name to be found in PATH.
        worker: module that runs a stage.
    """

    run_dir: Path
    code: Path
    cwd: Path
    python: str
    worker: str = "megatron_jet.run_stage"

    @property
    def cluster_dir(self) -> Path:
        return self.run_dir / "cluster"

    def step_script(self, job: Job) -> Path:
        return self.cluster_dir / "steps" / f"{job.name}.sh"

    def environment_script(self, cluster: ClusterConfig) -> Path:
        """Named by its content: jobs of an earlier submission keep theirs."""
        digest = hashlib.sha256(environment_text(cluster).encode()).hexdigest()
        return self.cluster_dir / "environment" / f"{digest[:12]}.sh"

    def state_dir(self, job: Job) -> Path:
        """Where the job's progress is on disk: a candidate has a directory of its own."""
        stage = self.run_dir / "stages" / job.stage
        candidate = job.target.partition(":")[2]
        return stage / "jobs" / candidate if candidate else stage

    def log_dir(self, job: Job) -> Path:
        return self.run_dir / "stages" / job.stage / "logs"


def sbatch_options(job: Job, cluster: ClusterConfig) -> dict[str, str | int | bool]:
    """sbatch's long options without `--`; True stands for an option without a value."""
    options: dict[str, str | int | bool | None] = {
        "account": cluster.account,
        "clusters": cluster.clusters,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "nodes": job.nodes,
        "ntasks-per-node": job.nproc,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.mem,
        "exclusive": cluster.exclusive or None,
        "time": cluster.time_limit,
        "signal": f"{EARLY_WARNING_SIGNAL}@{cluster.early_warning_seconds}",
        "open-mode": "append",
        # Without it, dependents of a failed job wait for ever.
        "kill-on-invalid-dep": "yes",
    }
    wanted = f"{cluster.gpu_type}:{job.gpus}" if cluster.gpu_type else job.gpus
    if job.gpus and cluster.gpu_request == "gpus-per-node":
        options["gpus-per-node"] = wanted
    elif job.gpus and cluster.gpu_request == "gres":
        options["gres"] = f"gpu:{wanted}"
    return {key: value for key, value in {**options, **cluster.sbatch}.items() if value is not None}


def sbatch_words(options: dict[str, str | int | bool]) -> list[str]:
    """`sbatch_options` as sbatch reads them."""
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]


def srun_options() -> list[str]:
    """Options of every step. Cores are left to the processes' own threads; PMIx is not needed and may be broken."""
    return ["--mpi=none", "--cpu-bind=none", "--kill-on-bad-exit=0", f"--wait={STEP_WAIT_SECONDS}"]


def container_options(cluster: ClusterConfig, place: JobPlace, *extra_mounts: str) -> list[str]:
    """pyxis options of a step that NeMo-Run does not start."""
    if cluster.container is None:
        return []
    mounts = ",".join([*container_mounts(cluster, place), *extra_mounts])
    return [f"--container-image={cluster.container.image}", f"--container-mounts={mounts}"]


def container_mounts(cluster: ClusterConfig, place: JobPlace) -> list[str]:
    """The cluster file's mounts, and the run directory and the working directory at their own paths.

    Raises:
        UserError: pyxis cannot mount one of these two.
    """
    if cluster.container is None:
        return []
    own = {str(place.cwd): "working directory", str(place.run_dir): "run directory"}
    for path, what in own.items():
        if not re.fullmatch(r"[A-Za-z0-9_./@+=~-]+", path):
            raise UserError(f"{what} {path}: a container can mount it with letters, digits and _ . / @ + = ~ - only")
    return [*cluster.container.mounts, *(f"{path}:{path}" for path in sorted(own))]


def check_mounts(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raise UserError when a container does not see what a run reads: no mount shows it at its own path."""
    if cluster.container is None:
        return
    shown = [
        Path(source) for source, target, *_ in (m.split(":") for m in cluster.container.mounts) if source == target
    ]
    inputs = {
        "teacher.path": config.teacher.path,
        "teacher.tokenizer": config.teacher.tokenizer,
        "data.path": config.data.path,
    }
    for key, text in inputs.items():
        if text is None or text.startswith("bundled"):
            continue
        path = home_expanded(text, key).absolute()
        for place in dict.fromkeys((path, path.resolve())):
            if not any(place.is_relative_to(mount) for mount in shown):
                where = "" if place == path else f" leads to {place}, which"
                raise UserError(
                    f"{key}={text}:{where or ' this'} is under no mount of the container; "
                    f"add {place.parent}:{place.parent} to container.mounts in the cluster file"
                )


def job_variables(job: Job, cluster: ClusterConfig, place: JobPlace) -> dict[str, str]:
    """What slurm/job.sh and slurm/step.sh need to know."""
    preflight = cluster.preflight
    return {
        "POSTNAS_JOB": job.name,
        "POSTNAS_TARGET": job.target,
        "POSTNAS_RUN_DIR": str(place.run_dir),
        "POSTNAS_CODE": str(place.code),
        "POSTNAS_CWD": str(place.cwd),
        "POSTNAS_PYTHON": place.python,
        "POSTNAS_WORKER": place.worker,
        "POSTNAS_NPROC": str(job.nproc),
        "POSTNAS_STATE_DIR": str(place.state_dir(job)),
        "POSTNAS_LOG_DIR": str(place.log_dir(job)),
        "POSTNAS_STEP_SCRIPT": str(place.step_script(job)),
        "POSTNAS_RESTARTS": str(cluster.restarts),
        "POSTNAS_PREFLIGHT": str(int(preflight.enabled)),
        "POSTNAS_PREFLIGHT_TIMEOUT": str(preflight.timeout_seconds),
        "POSTNAS_PREFLIGHT_REQUEUES": str(preflight.max_requeues),
        "POSTNAS_PREFLIGHT_DISK_GIB": str(preflight.free_disk_gib),
        "POSTNAS_PREFLIGHT_BANDWIDTH": str(preflight.min_bandwidth_gb_per_s),
        "POSTNAS_PREFLIGHT_COMMAND": preflight.command or "",
        "POSTNAS_GPUS": str(job.gpus),
    }


def write_scripts(jobs: Iterable[Job], cluster: ClusterConfig, place: JobPlace) -> None:
    """Write the step script of every job, and the environment that only its owner may read: it may hold tokens."""
    if cluster.env:
        write_text(place.environment_script(cluster), environment_text(cluster), mode=0o600)
    for job in jobs:
        write_text(place.step_script(job), step_script(job, cluster, place))


def environment_text(cluster: ClusterConfig) -> str:
    """The cluster file's `env` as a shell file."""
    return "\n".join([*_exports(cluster.env), ""])


def setup_lines(job: Job, cluster: ClusterConfig, place: JobPlace) -> str:
    """Lines of the batch script before the step starts."""
    steps = [*srun_options(), *container_options(cluster, place)]  # preflight's, and the plain script's
    # Preflight asks with them whether the job can start without some nodes; it adds those that are excluded already.
    options = {key: value for key, value in sbatch_options(job, cluster).items() if key != "exclude"}
    return "\n".join(
        [
            "set +evx",
            *_variables(job, cluster, place),
            f"postnas_srun=({' '.join(map(quote, steps))})",
            f"postnas_sbatch=({' '.join(map(quote, sbatch_words(options)))})",
            'source "$POSTNAS_CODE/slurm/job.sh"',
            "postnas_enter",
            *(f"postnas_load_module {quote(module)}" for module in cluster.modules),
            *_shell_code(cluster.setup),
            "postnas_begin",
        ]
    )


def step_script(job: Job, cluster: ClusterConfig, place: JobPlace) -> str:
    """The script of every process. It repeats the variables: a container may have started with others."""
    source = 'source "$POSTNAS_CODE/slurm/step.sh"'
    # The early warning may come while the set-up lines are at work, and kills who does not ignore it.
    return "\n".join(
        ["#!/bin/bash", f"trap '' {EARLY_WARNING_SIGNAL}", *_variables(job, cluster, place), *cluster.setup, source, ""]
    )


def quote(value: str) -> str:
    """One literal shell word.

    NeMo-Run replaces every `/nemo_run` in a script by a directory of its own; an empty pair of quotes in the middle
    keeps a user's value as it is.
    """
    return shlex.quote(value).replace("/nemo_run", "/nemo''_run")


def _shell_code(lines: tuple[str, ...]) -> list[str]:
    """The user's lines for a script that NeMo-Run writes: it must not replace a `/nemo_run` in them either."""
    if not any("/nemo_run" in line for line in lines):
        return list(lines)
    return [f"eval {quote(chr(10).join(lines))}"]


def default_python(cluster: ClusterConfig, own: str) -> str:
    """The Python of the jobs: the virtual environment's, the container's, or the one that runs the launcher."""
    if cluster.venv is not None:
        return f"{cluster.venv}/bin/python"
    return "python" if cluster.container is not None else own


def _variables(job: Job, cluster: ClusterConfig, place: JobPlace) -> list[str]:
    """Lines that set everything; later ones win. The values of `env` stay out of files that others may read."""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE") if cluster.offline else ()
    own = quote(str(place.environment_script(cluster)))
    return [
        *_exports({"TOKENIZERS_PARALLELISM": "false", **dict.fromkeys(offline, "1")}),
        *([f"source {own} || exit 1  # {' '.join(cluster.env)}"] if cluster.env else []),
        *_exports(job_variables(job, cluster, place)),
    ]


def _exports(variables: dict[str, str]) -> list[str]:
    return [f"export {key}={quote(value)}" for key, value in variables.items()]
