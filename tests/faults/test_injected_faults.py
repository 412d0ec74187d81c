"""One fault at a chosen moment of a run through the command that users type; `resume` ends like a run left alone.

Each was met in a review: stops that were lost or taken for damage, flipped and lost bytes in every file of a
checkpoint, weights that go bad, processes that stand still, second workers. faulty_worker.py injects them.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import miniature
from megatron_jet.configs.files import read_json
from megatron_jet.postnas.stage import strip_measured

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]
ROOT = Path(__file__).parents[2]
POSTNAS = ROOT / "launcher" / "postnas.py"
STAGES = ("prepare", "stage1", "export", "evaluate", "report")
LIMIT = 20  # seconds after which a process that stands still counts as wedged
STOP = 900.0  # seconds after which a run counts as hung


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults")
    miniature.write_inputs(path)
    plan = ("gla", "attn", "gla", "attn")
    changes = {"student_plan": plan, "stages": STAGES, "watchdog_seconds": float(LIMIT)}
    config = miniature.config(path)
    stage1 = config.stage1.replace(training=config.stage1.training.replace(steps=5, keep_best=False))
    run = miniature.open_run(path, "recipe", stage1=stage1, **changes)
    (path / "recipe.yaml").write_text((run / "config.yaml").read_text())
    return path


def launch(root: Path, name: str, nproc: int = 1, fault: str | None = None, rank: int = 0) -> subprocess.Popen:
    """Start a run, or go on with it; with a fault in its worker."""
    run = root / name
    new = ["run", str(root / "recipe.yaml"), f"nproc={nproc}", "--output", str(run)]
    environment = dict(os.environ)
    if fault is not None:
        environment |= {"JET_WORKER": "faulty_worker", "FAULT": fault, "FAULT_RANK": str(rank)}
        environment["PYTHONPATH"] = f"{ROOT / 'tests' / 'faults'}"
    return subprocess.Popen(
        [sys.executable, str(POSTNAS), *(["resume", str(run)] if run.exists() else new)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
        env=environment,
    )


def ended(process: subprocess.Popen, code: int) -> str:
    output, _ = process.communicate(timeout=STOP)
    assert process.returncode == code, output
    assert "Traceback" not in output, output
    return output


def outcome(run: Path) -> tuple[dict, bytes]:
    return strip_measured(read_json(run / "report.json")), (run / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def references(root):
    """What runs give that nothing happens to, by number of processes."""
    for nproc in (1, 2):
        ended(launch(root, f"reference{nproc}", nproc), 0)
    return {nproc: outcome(root / f"reference{nproc}") for nproc in (1, 2)}


STOPS = ("step:1", "step:3", "validate:4", "save:2", "save:5", "saved:5", "finish", "result", "score", "load", "export")


@pytest.mark.parametrize("place", [*STOPS, "compare"])
def test_sigterm_is_saved_and_75(root, references, place):
    """Never lost, never "damaged"; the stage after it does not start."""
    name = "term-" + place.replace(":", "-")
    output = ended(launch(root, name, fault=f"TERM@{place}"), 75)
    assert "damaged" not in output and "continue with" in output
    assert not (root / name / "report.json").exists()
    ended(launch(root, name), 0)
    assert outcome(root / name) == references[1]


def harm_flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def harm_zeros(path: Path) -> None:
    content = path.read_bytes()
    start = max(0, len(content) // 2 - 256)
    path.write_bytes(content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :])


def harm_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [harm_flip, harm_zeros, harm_cut])
@pytest.mark.parametrize("place", ["step:5", "result"])
def test_damage_in_any_file_of_the_newest_checkpoint(root, references, harm, place):
    """Killed, damaged and resumed once for every file that a checkpoint has; the last one of a stage is made anew."""
    name = f"{harm.__name__}-{place.replace(':', '-')}"
    ended(launch(root, name, fault=f"KILL@{place}"), 1)
    folder = root / name / "stages" / "stage1" / "jobs" / "student" / "checkpoints"
    newest = sorted(folder.glob("step-*"))[-1]
    for file in sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file()):
        harm(newest / file)
        log = root / name / "stages" / "stage1" / "log.txt"
        before = log.stat().st_size
        ended(launch(root, name, fault=f"KILL@{place}"), 1)
        assert f"{newest.name} is not usable and passed over" in log.read_text()[before:], file
    ended(launch(root, name), 0)
    assert outcome(root / name) == references[1]


@pytest.mark.parametrize("where", ["prepared/teacher", "stages/stage1/jobs/student/checkpoints/*/model"])
def test_damage_in_what_other_stages_read(root, references, where):
    """Noticed in one line that names the way out, which works."""
    name = "input-" + where.partition("/")[0]
    place = "step:1" if where.startswith("prepared") else "export"
    ended(launch(root, name, fault=f"KILL@{place}"), 1)
    (directory,) = (root / name).glob(where)
    harm_flip(max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size))
    output = ended(launch(root, name), 1)
    way_out = re.search(r"is not what was written.*delete (\S+result\.json) and run again", output)
    assert way_out, output
    Path(way_out.group(1)).unlink()
    ended(launch(root, name), 0)
    assert outcome(root / name) == references[1]


@pytest.mark.parametrize("place", ["step:1", "step:4", "step:5"])
def test_weights_that_go_bad_are_not_saved(root, references, place):
    name = "nan-" + place.replace(":", "-")
    output = ended(launch(root, name, fault=f"NAN@{place}"), 1)
    assert re.search(r"is not finite|nan", output)
    ended(launch(root, name), 0)
    assert outcome(root / name) == references[1]


@pytest.mark.parametrize(("place", "rank"), [("step:3", 0), ("step:3", 1), ("load", 1), ("export", 0), ("compare", 0)])
def test_a_process_that_stands_still_ends_the_run_by_name(root, references, place, rank):
    name = f"stop-{place.replace(':', '-')}-{rank}"
    output = ended(launch(root, name, nproc=2, fault=f"STOP@{place}", rank=rank), 1)
    assert re.search(rf"rank {rank} \(process \d+ on \S+\) has not moved for {LIMIT} seconds", output)
    log = "".join(path.read_text() for path in (root / name).glob("stages/*/log.txt"))
    assert "stacks of rank 0 " in log and "stacks of rank 1 " in log
    ended(launch(root, name), 0)
    assert outcome(root / name) == references[2]


def test_a_worker_that_was_thought_dead_writes_nothing_beside_the_next_one(root, references):
    """The launcher is killed while its worker stands still; who goes on is refused until that one has left."""
    process = launch(root, "thought-dead", fault="STOP@step:3")
    status = root / "thought-dead" / "stages" / "stage1" / "status.json"
    while not (status.exists() and is_stopped(read_json(status)["pid"])):
        assert process.poll() is None
        time.sleep(0.05)
    old = read_json(status)["pid"]
    process.kill()
    process.communicate()
    by_hand = [sys.executable, "-m", "megatron_jet.run_stage", str(root / "thought-dead"), "stage1"]
    second = subprocess.run(by_hand, capture_output=True, text=True, cwd=ROOT, check=False)
    assert second.returncode == 1 and f"process {old} on" in second.stderr, second.stderr
    os.kill(old, signal.SIGCONT)  # it finds that its launcher died, saves and leaves
    ended(launch(root, "thought-dead"), 0)
    assert not Path(f"/proc/{old}").exists()
    assert outcome(root / "thought-dead") == references[1]


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
