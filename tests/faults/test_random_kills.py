"""A fault campaign through the command that users type: kill -9 of any worker at random moments, then `resume`.

The kill points of tests/postnas/test_kill_and_resume.py are the known weak spots; this looks for unknown ones.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import miniature
from megatron_jet.configs.files import read_json
from megatron_jet.postnas.stage import strip_measured

pytestmark = pytest.mark.faults
POSTNAS = Path(__file__).parents[2] / "launcher" / "postnas.py"
STAGES = ("placement", "block_selection", "new_block", "hardware_search", "stage1", "stage2", "evaluate")
KILLS = 5  # stages in each of which a worker is killed
LATEST = 3.0  # seconds into a stage; the miniature's take one to ten
STOP = 600.0  # seconds after which a run counts as hung


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults")
    miniature.write_inputs(path)
    return path


def start(root: Path, name: str, nproc: int) -> subprocess.Popen:
    """Start or continue a run."""
    run = root / name
    config = root / "recipe.yaml"
    if not config.exists():
        config.write_text((miniature.open_run(root, "recipe") / "config.yaml").read_text())
    arguments = ["resume", str(run)] if run.exists() else ["run", str(config), f"nproc={nproc}", "--output", str(run)]
    return subprocess.Popen(
        [sys.executable, str(POSTNAS), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
    )


def workers(run: Path) -> list[int]:
    """Processes that do stages of this run (torchrun's agent, which only watches, is not one)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(run) in words and "megatron_jet.run_stage" in words and "torch.distributed.run" not in words:
            found.append(int(entry.parent.name))
    return found


def finish(process: subprocess.Popen) -> str:
    """Wait for the launcher and return what it said."""
    output, _ = process.communicate(timeout=STOP)
    return output


def kill_in(process: subprocess.Popen, run: Path, stage: str, rng: random.Random) -> bool:
    """Kill one worker a random time after `stage` began; False where the run was over before."""
    status = run / "stages" / stage / "status.json"
    # The status of a killed attempt says running, too, with a process that is gone.
    while not (status.exists() and (found := read_json(status))["state"] == "running" and found["pid"] in workers(run)):
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    time.sleep(rng.uniform(0, LATEST))
    alive = workers(run)
    if not alive:
        return False
    os.kill(rng.choice(sorted(alive)), signal.SIGKILL)
    return True


@pytest.mark.parametrize(("nproc", "seed"), [(1, 0), (2, 1), (2, 2)])
@pytest.mark.timeout(3000)
def test_a_run_killed_at_random_ends_like_one_left_alone(root, nproc, seed):
    reference = root / f"undisturbed{nproc}"
    if not reference.exists():
        output = finish(start(root, reference.name, nproc))
        assert (reference / "report.json").exists(), output
    rng, run, kills = random.Random(seed), root / f"disturbed{seed}", 0
    for index in sorted(rng.sample(range(len(STAGES)), KILLS)):
        process = start(root, run.name, nproc)
        killed = kill_in(process, run, STAGES[index], rng)
        output = finish(process)
        kills += killed
        if process.returncode == 0:
            break
        assert process.returncode == 1, output
        assert "error:" in output and "Traceback" not in output.split("error:")[-1], output
        assert not workers(run), "workers outlived the launcher"
    assert kills >= 3, "the run was over before anything happened"
    process = start(root, run.name, nproc)
    output = finish(process)
    assert process.returncode == 0, output
    assert strip_measured(read_json(run / "report.json")) == strip_measured(read_json(reference / "report.json"))
    exported = "export/model.safetensors"
    assert (run / exported).read_bytes() == (reference / exported).read_bytes()
    assert not [path for path in run.rglob(".*") if path.name not in (".metadata", ".lock")], "half-written files stay"
