"""A login node: only what `pip install megatron-jet[launch]` brings, so no torch, and no Slurm for --dryrun."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PAPER_HOURS = {
    "placement": 808,
    "block_selection": 3120,
    "new_block": 624,
    "hardware_search": 5616,
    "stage1": 624,
    "stage2": 7536,
}


def closure(requirement: Requirement, extras: frozenset[str], found: dict[str, Distribution]) -> None:
    """Installed distributions that a requirement pulls in."""
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    known = name in found
    try:
        found[name] = distribution(requirement.name)
    except PackageNotFoundError:
        return  # of another platform
    if known and not requirement.extras:
        return
    for text in found[name].requires or []:
        child = Requirement(text)
        markers = [{"extra": extra} for extra in (extras | requirement.extras) or {""}] + [{"extra": ""}]
        if child.marker is None or any(child.marker.evaluate(marker) for marker in markers):
            closure(child, frozenset(), found)


@pytest.fixture(scope="module")
def login_node(tmp_path_factory):
    """Environment variables under which Python sees these distributions and nothing else."""
    found: dict[str, Distribution] = {}
    closure(Requirement("megatron-jet[launch]"), frozenset({"launch"}), found)
    site = tmp_path_factory.mktemp("site")
    for dist in found.values():
        for file in dist.files or []:
            top = file.parts[0]
            source = Path(dist.locate_file(top))
            if top != ".." and source.exists() and not (site / top).exists() and not top.startswith("__editable"):
                (site / top).symlink_to(source)
    assert not (site / "torch").exists()
    assert not (site / "transformers").exists()
    assert (site / "nemo_run").exists()
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(site),
        "PYTHONPATH": str(site),
        "NEMORUN_HOME": str(site / "nemo"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def call(environment, *arguments, cwd):
    # -S: without this machine's site-packages.
    command = [sys.executable, "-S", str(ROOT / "launcher" / "postnas.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd, timeout=280)


def test_paper_run_on_paper(login_node, tmp_path):
    done = call(login_node, "run", "jet_nemotron_2b", "--cluster", "example_h100", "--dryrun", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage, hours in PAPER_HOURS.items():
        assert re.search(rf"^{stage} .*TP1 PP1 DP32 .*\b{hours:,} .*$", done.stdout, re.MULTILINE), stage
    assert done.stdout.count("#SBATCH --job-name=") == 24, "every script is shown"
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert "--container-image nvcr.io#nvidia/pytorch:26.01-py3" in done.stdout.replace("'", "")
    assert "sbatch --requeue --dependency=afterok:<placement>" in done.stdout
    assert "JET_TEACHERS is not set" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    assert not Path(login_node["NEMORUN_HOME"]).exists()


def test_dry_run_for_programs(login_node, tmp_path):
    arguments = ["run", "jet_nemotron_4b", "--cluster", "example_h100", "--stages", "stage2", "--dryrun", "--json"]
    plan = json.loads(call(login_node, *arguments, cwd=tmp_path).stdout)
    assert [job["name"] for job in plan["jobs"]] == ["prepare", "stage2"]
    assert plan["jobs"][1]["depends"] == ["prepare"]
    assert plan["scripts"]["stage2"].startswith("#!/bin/bash")
    assert "step.sh" in plan["steps"]["stage2"]


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["list"]])
def test_commands_answer(login_node, tmp_path, command):
    done = call(login_node, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def submission(tmp_path, *arguments):
    """Arguments of a `run` of the tiny_distill recipe on a small cluster."""
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 8, "num_attention_heads": 4}
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    more = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 448, "tie_word_embeddings": True}
    (teacher / "config.json").write_text(json.dumps({**shape, **more}))
    (teacher / "model.safetensors").touch()  # nothing reads it here
    return ["run", "tiny_distill", "--cluster", "local_slurm", f"teacher.path={teacher}", *arguments]


def test_a_run_is_submitted_watched_and_cancelled_without_torch(login_node, tmp_path):
    """Slurm's commands are scripts here: jobs 11, 12 and 13, the first of which is said to run."""
    (tmp_path / "bin").mkdir()
    count = tmp_path / "count"
    state = tmp_path / "state"
    state.write_text("11|RUNNING|None|n1|2026-11-21T06:00:00\n12|PENDING|Dependency||N/A\n")
    scripts = {
        "sbatch": f"echo x >> {count}; echo $((10 + $(wc -l < {count})))",
        "squeue": f"cat {state}",
        "sacct": "true",
        "scancel": f"echo '11|CANCELLED|None||N/A' > {state}; echo '12|CANCELLED|None||N/A' >> {state}",
    }
    for name, line in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**login_node, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}

    def launcher(*arguments):
        done = call(environment, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    started = launcher(*submission(tmp_path, "--stages", "stage1", "--output", "runs/a"))
    assert "2 jobs submitted to local_slurm" in started and " 12  stage1" in started
    rows = {line.split()[0]: line.split()[1:4] for line in launcher("status", "a").splitlines()[3:]}
    assert rows == {"prepare": ["running", "11", "n1"], "stage1": ["pending", "12", "(1)"]}
    assert launcher("list").splitlines()[2].split()[:3] == ["a", "tiny_distill", "running"]
    launcher("report", "a")
    assert "not finished" in (tmp_path / "runs/a/report.html").read_text()
    refused = call(environment, "clean", "a", "--all", cwd=tmp_path)
    assert refused.returncode == 1 and "jobs are in the queue or running" in refused.stderr
    assert "2 jobs cancelled" in launcher("cancel", "a")


def test_submission_without_slurm_is_one_line(login_node, tmp_path):
    done = call(login_node, *submission(tmp_path, "--stages", "report"), cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: submission failed: .*sbatch.*\n", done.stderr), done.stderr
    assert not os.environ.get("NEMORUN_HOME", "").startswith(str(tmp_path))


def test_inputs_that_need_a_network_are_named_before_anything_is_submitted(login_node, tmp_path):
    environment = {**login_node, "JET_TEACHERS": str(tmp_path / "t"), "JET_DATA": str(tmp_path / "d")}
    done = call(environment, "run", "jet_nemotron_2b", "--cluster", "example_h100", cwd=tmp_path)
    assert done.returncode == 2
    assert "teacher.path=" in done.stderr and "data.path=" in done.stderr and "tools/prefetch.py" in done.stderr
    assert not list(tmp_path.iterdir())
