"""What is said and refused before a job goes to a cluster's queue."""

import json


def cluster_file(path, **changes):
    """Nodes without GPUs; JSON is YAML."""
    fields = {"scheduler": "slurm", "nodes": 1, "offline": False, "job_dir": str(path.parent / "jobs"), **changes}
    path.write_text(json.dumps(fields))
    return path


def test_disk_smaller_than_all_candidates_at_once_is_refused(launcher, workplace, teacher, tmp_path, monkeypatch):
    """Candidates run at the same time there: no checkpoint is gone yet when the last one needs space."""
    monkeypatch.setattr("jet_launcher.forecast.free_bytes", lambda path: 1 << 20)
    submitted = []
    monkeypatch.setattr("jet_launcher.cluster_launch.submit_run", lambda *arguments: submitted.append(arguments))
    cluster = cluster_file(tmp_path / "small.yaml")
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", "--cluster", cluster)
    assert code == 1
    assert "the run needs up to" in err and "1,024.0 KiB free" in err
    assert submitted == []


def test_dry_run_says_which_inputs_are_not_ready(launcher, workplace, teacher, tmp_path, monkeypatch):
    # NeMo-Run writes them, and reads the terminal meanwhile.
    monkeypatch.setattr(
        "jet_launcher.slurm.launch.batch_scripts", lambda graph, *_: {job.name: "" for job in graph.jobs}
    )
    cluster = cluster_file(tmp_path / "small.yaml")
    arguments = ("run", "tiny", f"teacher.path={teacher}", "--cluster", cluster, "--stages", "stage1", "--dryrun")
    code, out, _ = launcher(*arguments, "data.path=/no/data")
    assert code == 0
    assert "not ready here: data.path=/no/data: no index.json there" in out
    code, out, _ = launcher(*arguments)
    assert code == 0 and "not ready here" not in out
