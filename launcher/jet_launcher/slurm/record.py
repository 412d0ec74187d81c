"""cluster/experiment.json in a run directory: what was submitted where, one entry per submission."""

import os
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.ask import is_job_id, number_of
from jet_launcher.slurm.graph import Job, JobGraph
from jet_launcher.slurm.package import ShippedCode
from jet_launcher.slurm.scripts import JobPlace
from jet_launcher.slurm.taken import Submitted
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.configs.stages import STAGE_ORDER
from megatron_jet.configs.training import ParallelConfig


@dataclass(frozen=True)
class RecordedJob:
    """A job of the latest submission that had it."""

    job: Job
    job_id: str


@dataclass(frozen=True)
class ClusterRecord:
    """What experiment.json says.

    Attributes:
        name: of the cluster, as `--cluster` took it.
        cluster: the cluster file as it was at the last submission.
        submissions: one per `run`, `resume` and call of the plain script, oldest first; none when the first one was
            refused.
    """

    name: str
    cluster: ClusterConfig
    submissions: list[dict[str, Any]]

    @property
    def jobs(self) -> list[RecordedJob]:
        """Every job of the run, in order, as last submitted."""
        found: dict[str, RecordedJob] = {}
        for submission in self.submissions:
            for row in submission["jobs"]:
                job = Job(**{**row["job"], "layout": ParallelConfig.parse(row["job"]["layout"])})
                job = Job(**{**job.__dict__, "depends": tuple(job.depends)})
                found[job.name] = RecordedJob(job, row["job_id"])
        position = {name: i for i, name in enumerate(found)}
        # Candidates before the job that ranks them.
        return sorted(
            found.values(),
            key=lambda e: (STAGE_ORDER.index(e.job.stage), e.job.target == e.job.stage, position[e.job.name]),
        )

    def batch_log(self, run: RunDirectory, job: Job, job_id: str) -> Path:
        """Output of a job's batch script: in NeMo-Run's directory, or with the logs of a job of the plain script."""
        submission = next(s for s in self.submissions if any(row["job_id"] == job_id for row in s["jobs"]))
        if submission["experiment"] is None:
            return run.stage(job.stage) / "logs" / f"{job.name}.{number_of(job_id)}.batch.log"
        title, _, _ = submission["experiment"].rpartition("_")
        folder = Path(submission["nemorun_home"]) / "experiments" / title / submission["experiment"] / job.name
        return folder / f"sbatch_{title}.{job.name}_{number_of(job_id)}.out"

    @property
    def all_job_ids(self) -> list[str]:
        """Of every submission."""
        return [row["job_id"] for submission in self.submissions for row in submission["jobs"]]

    @property
    def since(self) -> str | None:
        """Start of the first submission, local time as Slurm writes it; an hour before, for clocks that differ."""
        times = (submission.get("time") for submission in self.submissions)
        try:
            first = min(datetime.strptime(time, "%Y-%m-%dT%H:%M:%S%z") for time in times)
        except (TypeError, ValueError):
            return None
        return (first.astimezone() - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%S")


def record_file(run: RunDirectory) -> Path:
    """Where the record of a run on a cluster lies."""
    return run.path / "cluster" / "experiment.json"


def _private_file(run: RunDirectory) -> Path:
    return run.path / "cluster" / "environment.json"


def _private(run: RunDirectory) -> dict[str, Any]:
    """The fields of the cluster file that experiment.json leaves out; none for somebody who may not read them."""
    path = _private_file(run)
    return {"env": read_json(path)["env"]} if os.access(path, os.R_OK) else {}


def read_record(run: RunDirectory) -> ClusterRecord | None:
    """The record of a run, or None when it never went to a cluster.

    Raises:
        UserError: the file is not what `SubmissionLog` writes.
    """
    path = record_file(run)
    if not path.is_file():
        return None
    data = read_json(path)
    try:
        cluster = ClusterConfig.parse({**data["cluster"], **_private(run)}, str(path))
        record = ClusterRecord(data["name"], cluster, data["submissions"])
        # Whatever commands read, so that none of them stumbles later.
        whole = isinstance(record.name, str) and all(map(is_job_id, record.all_job_ids))
        whole = whole and all(record.batch_log(run, entry.job, entry.job_id) for entry in record.jobs)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration):
        whole = False
    if not whole:
        raise UserError(
            f"{path}: is not a complete record of submitted jobs; remove it when squeue shows none of this run"
        )
    return record


class SubmissionLog:
    """experiment.json while jobs are submitted: the cluster before the first one, then every job ID as it comes.

    Whatever ends the launcher in between, `status`, `cancel` and `resume` know the jobs and where the run belongs.
    """

    def __init__(
        self, run: RunDirectory, name: str, cluster: ClusterConfig, graph: JobGraph, place: JobPlace, code: ShippedCode
    ) -> None:
        """Write name and cluster."""
        before = read_record(run)
        self._run, self._name, self._cluster = run, name, cluster
        self._before = before.submissions if before else []
        self._jobs, self._place, self._code = graph.jobs, place, code
        self._time = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._write(self._before)

    def keep(self, submitted: Submitted) -> None:
        """Write what Slurm has taken so far."""
        entry = {
            "time": self._time,
            "experiment": submitted.experiment,
            "nemorun_home": str(submitted.home) if submitted.home else None,
            "code": str(self._place.code),
            "code_sha256": self._code.digest,
            "jobs": [
                {"job_id": submitted.job_ids[job.name], "job": {**asdict(job), "layout": job.layout.to_dict()}}
                for job in self._jobs
                if job.name in submitted.job_ids
            ],
        }
        self._write([*self._before, entry])

    def note_launch(self, submitted: Submitted) -> None:
        """Name the submission in the last launch of provenance.json."""
        provenance = self._run.provenance()
        if provenance["launches"]:
            provenance["launches"][-1]["cluster"] = {
                "name": self._name,
                "experiment": submitted.experiment,
                "code": str(self._place.code.relative_to(self._place.run_dir)),
                "code_sha256": self._code.digest,
                "jobs": submitted.job_ids,
            }
            write_json(self._run.provenance_file, provenance)

    def _write(self, submissions: list[dict[str, Any]]) -> None:
        cluster = self._cluster.to_dict()
        # Others may look at a run; tokens are for its owner.
        write_json(_private_file(self._run), {"env": cluster.pop("env")}, mode=0o600)
        body = {"name": self._name, "cluster": cluster, "submissions": submissions}
        write_json(record_file(self._run), body)
