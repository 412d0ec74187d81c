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
        assert re.search(rf"^{stage} .*TP1 PP1 DP32 .*\b{hours:,}$", done.stdout, re.MULTILINE), stage
    assert done.stdout.count("#SBATCH --job-name=") == 24, "every script is shown"
    assert "#SBATCH --gpus-per-node=8" in done.stdout
    assert "--container-image 'nvcr.io#nvidia/nemo:25.11'" in done.stdout.replace("nvcr.io#", "'nvcr.io#", 1) or (
        "--container-image nvcr.io#nvidia/nemo" in done.stdout
    )
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


def test_submission_without_slurm_is_one_line(login_node, tmp_path):
    shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 8, "num_attention_heads": 4}
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    more = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 448, "tie_word_embeddings": True}
    (teacher / "config.json").write_text(json.dumps({**shape, **more}))
    arguments = ["run", "tiny", "--cluster", "local_slurm", "--stages", "report", f"teacher.path={teacher}"]
    done = call(login_node, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: submission failed: .*sbatch.*\n", done.stderr), done.stderr
    assert not os.environ.get("NEMORUN_HOME", "").startswith(str(tmp_path))


def test_inputs_that_need_a_network_are_named_before_anything_is_submitted(login_node, tmp_path):
    environment = {**login_node, "JET_TEACHERS": str(tmp_path / "t"), "JET_DATA": str(tmp_path / "d")}
    done = call(environment, "run", "jet_nemotron_2b", "--cluster", "example_h100", cwd=tmp_path)
    assert done.returncode == 1
    assert "teacher.path=" in done.stderr and "data.path=" in done.stderr and "tools/prefetch.py" in done.stderr
    assert not list(tmp_path.iterdir())
