"""cluster/experiment.json in a run directory: what was submitted where, one entry per submission."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.experiment import Submitted
from jet_launcher.slurm.graph import Job, JobGraph
from jet_launcher.slurm.package import ShippedCode
from jet_launcher.slurm.scripts import JobPlace
from megatron_jet.configs.cluster import ClusterConfig
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
        submissions: one per `run` and `resume`, oldest first.
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

    def batch_log(self, name: str, job_id: str) -> Path:
        """Output of a job's batch script, in NeMo-Run's directory."""
        submission = next(s for s in self.submissions if any(row["job_id"] == job_id for row in s["jobs"]))
        title, _, _ = submission["experiment"].rpartition("_")
        folder = Path(submission["nemorun_home"]) / "experiments" / title / submission["experiment"] / name
        return folder / f"sbatch_{title}.{name}_{job_id}.out"

    @property
    def all_job_ids(self) -> list[str]:
        """Of every submission."""
        return [row["job_id"] for submission in self.submissions for row in submission["jobs"]]


def record_file(run: RunDirectory) -> Path:
    return run.path / "cluster" / "experiment.json"


def read_record(run: RunDirectory) -> ClusterRecord | None:
    """The record of a run, or None when it never went to a cluster."""
    path = record_file(run)
    if not path.is_file():
        return None
    data = read_json(path)
    return ClusterRecord(data["name"], ClusterConfig.parse(data["cluster"], str(path)), data["submissions"])


def add_submission(
    run: RunDirectory,
    name: str,
    cluster: ClusterConfig,
    graph: JobGraph,
    place: JobPlace,
    code: ShippedCode,
    submitted: Submitted,
) -> None:
    """Append a submission to the record, and name it in provenance.json."""
    before = read_record(run)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "experiment": submitted.experiment,
        "nemorun_home": str(submitted.home),
        "code": str(place.code),
        "code_sha256": code.digest,
        "jobs": [
            {"job_id": submitted.job_ids[job.name], "job": {**asdict(job), "layout": job.layout.to_dict()}}
            for job in graph.jobs
        ],
    }
    submissions = [*(before.submissions if before else []), entry]
    write_json(record_file(run), {"name": name, "cluster": cluster.to_dict(), "submissions": submissions})
    provenance = run.provenance()
    if provenance["launches"]:
        provenance["launches"][-1]["cluster"] = {
            "name": name,
            "experiment": submitted.experiment,
            "code": str(place.code.relative_to(run.path.resolve())),
            "code_sha256": code.digest,
            "jobs": submitted.job_ids,
        }
        write_json(run.provenance_file, provenance)
