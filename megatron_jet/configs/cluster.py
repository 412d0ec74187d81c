"""A cluster file: where and how the stages of a run become Slurm jobs.

Values are data, never shell: what ends in a script is quoted literally or refused here. Only `setup` and
`preflight.command` are shell code, by intention. slurm/clusters/example_h100.yaml shows and explains every field.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat, field_validator, model_validator

from megatron_jet.configs.base import StrictModel

# Written by the launcher for every rank; a cluster file that sets them would break the process group or the code path.
OWNED_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
OWNED_PREFIXES = ("POSTNAS_", "SLURM_", "SBATCH_", "SRUN_")
# sbatch options that belong to the launcher or have a field of their own.
OWNED_SBATCH = (
    "account", "partition", "qos", "reservation", "constraint", "exclude", "nodes", "ntasks", "ntasks-per-node",
    "gpus-per-node", "gres", "cpus-per-task", "mem", "exclusive", "time", "signal", "dependency", "kill-on-invalid-dep",
    "job-name", "output", "error", "open-mode", "requeue", "no-requeue", "array", "wrap", "parsable", "chdir", "export",
    "wait", "test-only", "hold", "clusters", "export-file", "no-kill", "help", "usage", "version", "quiet",
    "het-group",
)  # fmt: skip
# These count GPUs in other ways: for the whole job, so that jobs of one node ask for as many as those of four, or for
# every process, which then sees one GPU alone while the code takes the one of its local rank.
OTHER_GPU_COUNTS = ("gpus", "gpus-per-task", "gpus-per-socket", "ntasks-per-gpu")
# Slurm keeps the time of --signal in 16 bits.
_LARGEST_WARNING = 65535
_TIME = re.compile(r"(\d+-)?\d{1,3}:[0-5]\d:[0-5]\d")


def _as_text(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError("write text")
    return value


def _as_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("write a number")
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value) else value


def _printable(text: str) -> str:
    for character in text:
        if not character.isprintable():
            raise ValueError(f"holds the control character {character!r}; a cluster file takes one-line text only")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:+,-]*", _printable(text)):
        raise ValueError("may hold letters, digits and _ . @ : + , - only")
    return text


def _account(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:+,/-]*", _printable(text)):
        raise ValueError("may hold letters, digits and _ . @ : + , / - only")
    return text


def _gpu_type(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", _printable(text)):
        raise ValueError("write a type as Slurm's gres.conf has it, for example h100; the number is gpus_per_node")
    return text


def _one_cluster(text: str) -> str:
    # Jobs of a run wait for one another, which Slurm knows on one cluster only.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", _printable(text)):
        raise ValueError("write the name of one cluster: letters, digits and _ . - only")
    return text


def _constraint(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_\[(][A-Za-z0-9_.@:+,&|*\[\]()!-]*", _printable(text)):
        raise ValueError("may hold feature names and Slurm's operators & | * [ ] ( ) , only")
    return text


def _node_list(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", _printable(text)):
        raise ValueError("write node names as Slurm does: node003,node[010-012]")
    return text


def _path(text: str) -> str:
    # NeMo-Run writes paths into scripts without quotes, so nothing that a shell would read is let through.
    if not re.fullmatch(r"[A-Za-z0-9_./@+,=~-]+", _printable(text)):
        raise ValueError("may hold letters, digits and _ . / @ + , = ~ - only (no spaces)")
    return text


def _absolute(text: str) -> str:
    if not _path(text).startswith("/"):
        raise ValueError("must be an absolute path")
    return text


def _mount(text: str) -> str:
    parts = _printable(text).split(":")
    if len(parts) not in (2, 3) or not all(parts) or "," in text:
        raise ValueError("write source:target or source:target:flags, without commas")
    _absolute(parts[0])
    _absolute(parts[1])
    _name("".join(parts[2:]) or "ro")
    return text


def _image(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_./:@#+~-]+", _printable(text)) or text.startswith("-"):
        raise ValueError("write an image such as nvcr.io#nvidia/pytorch:25.09-py3 or the path of a .sqsh file")
    return text


Text = Annotated[str, AfterValidator(_printable)]
Name = Annotated[str, BeforeValidator(_as_text), AfterValidator(_name)]
Account = Annotated[str, BeforeValidator(_as_text), AfterValidator(_account)]
GpuType = Annotated[str, BeforeValidator(_as_text), AfterValidator(_gpu_type)]
OneCluster = Annotated[str, BeforeValidator(_as_text), AfterValidator(_one_cluster)]
Constraint = Annotated[str, BeforeValidator(_as_text), AfterValidator(_constraint)]
NodeList = Annotated[str, BeforeValidator(_as_text), AfterValidator(_node_list)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Count = Annotated[int, BeforeValidator(_as_number)]


class ContainerConfig(StrictModel):
    """A pyxis container. Without one, jobs run on the node itself, in `venv`."""

    image: Annotated[str, AfterValidator(_image)] = Field(description="registry#image:tag, or the path of a .sqsh file")
    mounts: tuple[Annotated[str, AfterValidator(_mount)], ...] = Field(
        default=(), description="source:target[:flags]; the job directory is always mounted at its own path"
    )


class TunnelConfig(StrictModel):
    """Where sbatch runs: here (this is a login node), or on a login node reached by SSH."""

    kind: Literal["local", "ssh"] = "local"
    host: Name | None = Field(default=None, description="login node, as ssh understands it")
    user: Name | None = Field(default=None, description="None: as in ~/.ssh/config")
    port: Count | None = Field(default=None, ge=1, le=65535)
    identity: Annotated[str, AfterValidator(_path)] | None = Field(default=None, description="private key file")
    python: Annotated[str, AfterValidator(_path)] = Field(
        default="python3", description="Python on the login node that has megatron-jet[launch]"
    )

    @model_validator(mode="after")
    def _complete(self) -> "TunnelConfig":
        if self.kind == "ssh" and self.host is None:
            raise ValueError("kind: ssh needs a host")
        if self.kind == "local" and (self.host or self.user or self.port or self.identity):
            raise ValueError("host, user, port and identity need kind: ssh")
        return self


class PreflightConfig(StrictModel):
    """Checks at the start of every allocation. A node that fails is excluded and the job queued again."""

    enabled: bool = True
    free_disk_gib: FiniteFloat = Field(default=20.0, ge=0, description="free space wanted in the run directory")
    min_bandwidth_gb_per_s: FiniteFloat = Field(
        default=1.0,
        ge=0,
        description="all-reduce bus bandwidth over all ranks, GB/s; 0: no all-reduce, no torch import",
    )
    timeout_seconds: Count = Field(default=300, ge=5, description="a node that has not answered by then is bad")
    command: Text | None = Field(default=None, description="your own check, run by bash on every node; non-zero: bad")
    max_requeues: Count = Field(default=3, ge=0, description="restarts of one job because of bad nodes")


class ClusterConfig(StrictModel):
    """One place that runs stages."""

    scheduler: Literal["local", "slurm"] = Field(default="slurm", description="local: this machine, no Slurm")
    account: Account | None = None
    clusters: OneCluster | None = Field(default=None, description="sbatch --clusters, one name; None: the site's own")
    partition: Name | None = Field(default=None, description="None: the cluster's default")
    qos: Name | None = None
    reservation: Name | None = None
    constraint: Constraint | None = Field(default=None, description="node features")
    exclude: NodeList | None = Field(default=None, description="nodes never to use, comma-separated")
    nodes: Count = Field(default=1, ge=1, description="largest number of nodes one job may ask for")
    gpus_per_node: Count = Field(default=0, ge=0, description="0: CPU nodes, processes talk over gloo")
    gpu_type: GpuType | None = Field(default=None, description="for sites that want it named, for example h100")
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        default="gpus-per-node", description="how GPUs are asked for; none: the site hands out whole nodes"
    )
    cpus_per_task: Count | None = Field(default=None, ge=1, description="cores per process; None: the site's default")
    mem: Name | None = Field(default=None, description="memory per node; '0': all of it; None: the site's default")
    exclusive: bool = Field(default=False, description="whole nodes")
    time_limit: str = Field(default="04:00:00", description="[days-]hours:minutes:seconds of one allocation")
    early_warning_seconds: Count = Field(
        default=300,
        ge=10,
        le=_LARGEST_WARNING,
        description="before the time limit: save and queue again; twice the time of a checkpoint",
    )
    container: ContainerConfig | None = None
    venv: AbsolutePath | None = Field(default=None, description="virtual environment on the shared file system")
    modules: tuple[Text, ...] = Field(default=(), description="module load, in order")
    setup: tuple[Text, ...] = Field(default=(), description="shell lines, run on the head node and by every process")
    env: dict[str, Text] = Field(default_factory=dict, description="environment of every process, quoted literally")
    sbatch: dict[str, Text] = Field(default_factory=dict, description="further sbatch options without the leading --")
    tunnel: TunnelConfig = TunnelConfig()
    job_dir: AbsolutePath | None = Field(
        default=None, description="shared directory that gets one run directory per run; None: ./runs"
    )
    restarts: Count = Field(default=2, ge=0, description="restarts of a crashing job that makes no progress in between")
    offline: bool = Field(default=True, description="compute nodes have no network")
    preflight: PreflightConfig = PreflightConfig()

    @field_validator("time_limit", mode="before")
    @classmethod
    def _time(cls, value: Any) -> str:
        if not isinstance(value, str) or not _TIME.fullmatch(value):
            raise ValueError("write [days-]hours:minutes:seconds, for example 04:00:00")
        return value

    @field_validator("env", "sbatch", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("write a mapping, one NAME: value per line")
        for key, item in value.items():
            if isinstance(item, bool) or item is None or isinstance(item, dict | list):
                raise ValueError(f'{key}: write text, "" for none')
        return {str(key): str(item) for key, item in value.items()}

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str]) -> dict[str, str]:
        for key in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise ValueError(f"{key!r} is not the name of an environment variable")
            if key in OWNED_VARIABLES or key.startswith(OWNED_PREFIXES):
                raise ValueError(f"{key} is set by the launcher or by Slurm")
        return env

    @field_validator("sbatch")
    @classmethod
    def _options(cls, options: dict[str, str]) -> dict[str, str]:
        for key in options:
            if not re.fullmatch(r"[a-z][a-z-]*", key):
                raise ValueError(f"{key!r} is not an sbatch option (write it long, without --)")
            if key in ("gres", "gpus-per-node"):
                raise ValueError(f"{key} is set by the launcher; see gpus_per_node, gpu_type and gpu_request")
            if key in OWNED_SBATCH:
                raise ValueError(f"{key} is set by the launcher or has a field of its own")
            if key in OTHER_GPU_COUNTS:
                raise ValueError(f"{key} counts GPUs otherwise; use the fields gpus_per_node, gpu_type and gpu_request")
            starts = [owned for owned in OWNED_SBATCH if owned.startswith(key)]
            if starts:
                raise ValueError(f"sbatch takes {key} for {starts[0]}; write options in full")
        return options

    @model_validator(mode="after")
    def _consistent(self) -> "ClusterConfig":
        if self.container is not None and self.venv is not None:
            raise ValueError("give container or venv, not both")
        if self.early_warning_seconds >= self.time_limit_seconds:
            raise ValueError(f"early_warning_seconds={self.early_warning_seconds} is not below time_limit")
        return self

    @property
    def time_limit_seconds(self) -> int:
        """The time limit in seconds."""
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
