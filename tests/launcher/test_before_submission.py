"""What is said and refused before a job goes to a cluster's queue."""

import json
from pathlib import Path

import pytest

from jet_launcher.forecast import check_space
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.launch import node_path, working_directory
from megatron_jet.configs.errors import UserError


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


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "stage1.blend={nosource: 1}",
            "no source 'nosource' in split 'train'; they have choice, copy, recall, text",
        ),
        ("placement.objective=nosuch", "placement.objective: 'nosuch' is not in the search split"),
        ("data.heldout_split=nosuch", "nosuch"),
    ],
)
def test_sources_of_the_bundled_data_are_known_before_they_are_made(launcher, workplace, override, words, capsys):
    code, _, err = launcher("run", "tiny", override, "--output", "runs/refused")
    assert code == 2 and words in err
    assert not Path("runs/refused").exists()
    assert f"not ready here: {err.removeprefix('error: ').strip()}" in launcher("run", "tiny", override, "--dryrun")[1]


def test_disk_of_a_run_that_has_begun_counts_what_is_there(tmp_path, monkeypatch):
    """And says what `resume` can follow: a run stays in its directory."""
    run = RunDirectory(tmp_path / "a")
    for stage, size in (("stage1", 3000), ("prepare", 500)):
        (run.stage(stage) / "checkpoints").mkdir(parents=True)
        (run.stage(stage) / "checkpoints" / "x").write_bytes(bytes(size))
    (run.stage("prepare") / "result.json").write_text("{}")
    monkeypatch.setattr("jet_launcher.forecast.free_bytes", lambda path: 1000)
    check_space(4000, run)
    with pytest.raises(UserError, match=r"needs up to 1025 B more but the disk has 1000 B free; free some there"):
        check_space(4001 + 24, run)
    with pytest.raises(UserError, match="give an --output on another one"):
        check_space(4001, RunDirectory(tmp_path / "new"))


def test_nodes_get_links_as_they_were_written(place, monkeypatch):
    """What they lead to here may not be what nodes call it."""
    real, link = place.folder / "real", place.folder / "link"
    (real / "work").mkdir(parents=True)
    link.symlink_to(real)
    monkeypatch.chdir(link / "work")
    monkeypatch.setenv("PWD", str(link / "work"))
    place.run = link / "jobs" / "a"
    assert place.plain() == 0
    script = (real / "jobs" / "a" / "cluster" / "plain" / "stage1.sh").read_text()
    assert f"export POSTNAS_RUN_DIR={link}/jobs/a\n" in script
    assert f"export POSTNAS_CWD={link}/work\n" in script
    assert f"export POSTNAS_CODE={link}/jobs/a/code/" in script
    assert str(real) not in script
    # Through the link that `run` makes in runs/, the directory is still what it was called.
    Path("runs").mkdir()
    Path("runs/a").symlink_to(place.run)
    assert node_path(RunDirectory(Path("runs/a"))) == place.run
    monkeypatch.setenv("PWD", "/nowhere")
    assert working_directory() == real / "work"
