"""Calling Slurm's commands, and finding in their answers what was asked for.

Users set variables that change what these commands mean (SQUEUE_PARTITION, SLURM_CLUSTERS), and sites wrap them in
scripts that greet, count quotas or warn. So they run without such variables, and an answer is searched for the line
that fits, never taken whole. slurm/job.sh does the same on the nodes.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# What options of the commands come from, and what tells a job that it is part of another one.
_STEERING = (
    "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SACCTMGR_", "SCANCEL_", "SCONTROL_", "SINFO_", "SLURM_",
    "POSTNAS_",
)  # fmt: skip
# Where Slurm is, and the proof of who asks, where a site uses tokens.
_KEPT = ("SLURM_CONF", "SLURM_JWT")
_TIMEOUT = 60.0
# What terminals read as colours, titles and character sets (`tput sgr0` sends two kinds).
_COLOUR = re.compile(r"\x1b(?:\[[0-9;?]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Za-z0-9])")
_NUMBER = re.compile(r"[1-9][0-9]*")
_SUBMITTED = re.compile(
    r"(?:Submitted batch job )?(?P<number>[1-9][0-9]*)(?:(?:;| on cluster )(?P<cluster>[A-Za-z0-9_.-]+))?"
)
_JOB_ID = re.compile(r"[1-9][0-9]*(;[A-Za-z0-9_.-]+)?")


@dataclass(frozen=True)
class Answer:
    """What a Slurm command printed, and why it failed ("" when it did not)."""

    output: str
    error: str


def plain_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """A copy without the variables that steer Slurm's commands."""
    return {key: value for key, value in environment.items() if key in _KEPT or not key.startswith(_STEERING)}


@contextlib.contextmanager
def scheduler_environment() -> Iterator[None]:
    """The same for whatever this process starts: NeMo-Run calls sbatch itself, and sbatch hands on what it finds."""
    kept = plain_environment()
    hidden = {key: value for key, value in os.environ.items() if key not in kept}
    for key in hidden:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(hidden)


def ask(command: list[str]) -> Answer:
    """Run a Slurm command, a minute at most."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, env=plain_environment()
        )
    except subprocess.TimeoutExpired:
        return Answer("", f"{command[0]}: no answer within {_TIMEOUT:.0f} s")
    except OSError as error:
        return Answer("", f"{command[0]}: {error.strerror or error}")
    output, errors = (_COLOUR.sub("", text) for text in (done.stdout, done.stderr))
    if done.returncode == 0:
        return Answer(output, "")
    lines = filter(None, map(str.strip, errors.splitlines()))
    return Answer(output, "\n".join(lines) or f"{command[0]} ended with {done.returncode}")


def submitted_id(said: str) -> str | None:
    """The job ID in what sbatch printed: `11`, or `11;cluster` where it named one. None unless one line fits, or
    several that name the same job."""
    lines = (_COLOUR.sub("", line).strip() for line in said.splitlines())
    found = [match for match in map(_SUBMITTED.fullmatch, lines) if match]
    numbers = {match.group("number") for match in found}
    clusters = {match.group("cluster") for match in found} - {None}
    if len(numbers) != 1 or len(clusters) > 1:
        return None
    return ";".join([*numbers, *clusters])


def no_id(said: str) -> str:
    """One line about an answer of sbatch in which `submitted_id` finds none."""
    return f"sbatch printed no job ID that can be told from the rest ({' '.join(said.split())[:300] or 'nothing'})"


def is_job_id(text: object) -> bool:
    """Whether this can be a job ID of ours: digits, and `;cluster` if need be."""
    return isinstance(text, str) and _JOB_ID.fullmatch(text) is not None


def number_of(job_id: str) -> str:
    """The number in a job ID: what the job itself calls SLURM_JOB_ID."""
    return job_id.partition(";")[0]


def cluster_of_job(job_id: str) -> str:
    """The cluster in a job ID; "" for the one of this login node."""
    return job_id.partition(";")[2]


def by_cluster(job_ids: Iterable[str]) -> dict[str, dict[str, str]]:
    """Job IDs by their number, by cluster."""
    found: dict[str, dict[str, str]] = {}
    for job_id in job_ids:
        found.setdefault(cluster_of_job(job_id), {})[number_of(job_id)] = job_id
    return found


def command_on(cluster: str, name: str, *arguments: str) -> list[str]:
    """A Slurm command for one cluster; "" is the one of this login node."""
    return [name, *([f"--clusters={cluster}"] if cluster else []), *arguments]


def shell_words(name: str, job_ids: Iterable[str]) -> str:
    """`scancel 11 12`, or what to type for jobs of named clusters."""
    groups = by_cluster(job_ids)
    return "; ".join(
        " ".join([name, *(["-M", cluster] if cluster else []), *numbers]) for cluster, numbers in groups.items()
    )


def release_words(job_id: str) -> str:
    """What to type to let a held job go."""
    cluster = cluster_of_job(job_id)
    return f"`scontrol {f'-M {cluster} ' if cluster else ''}release {number_of(job_id)}`"


def is_number(text: str) -> bool:
    """Whether this is a job's number: other lines of an answer are not about jobs."""
    return _NUMBER.fullmatch(text) is not None
