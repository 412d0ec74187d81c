"""Who may read what of cluster/ in a run directory."""

from types import SimpleNamespace

import pytest

from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.record import SubmissionLog, read_record, record_file
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.files import read_json, write_json

CLUSTER = ClusterConfig(env={"TOKEN": "hf_secret"}, partition="batch")


@pytest.fixture
def run(tmp_path):
    """A run whose first job is about to be submitted."""
    run = RunDirectory(tmp_path / "a")
    SubmissionLog(run, "mine", CLUSTER, SimpleNamespace(jobs=()), None, None)
    return run


def test_values_of_the_environment_are_for_their_owner_alone(run):
    holding = [path for path in run.path.rglob("*") if path.is_file() and "hf_secret" in path.read_text()]
    assert [path.stat().st_mode & 0o777 for path in holding] == [0o600]
    assert record_file(run) not in holding, "others of the group use `status`"
    assert read_record(run).cluster == CLUSTER, "`resume` without the cluster file"


def test_record_of_somebody_else_is_read_without_them(run, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert read_record(run).cluster == CLUSTER.replace(env={})


def test_older_record_holds_them_itself(run):
    (run.path / "cluster" / "environment.json").unlink()
    record = read_json(record_file(run))
    write_json(record_file(run), {**record, "cluster": CLUSTER.to_dict()})
    assert read_record(run).cluster == CLUSTER
