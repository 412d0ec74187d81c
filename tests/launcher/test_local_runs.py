"""A run from start to end, and every way a worker can end, with a stand-in worker."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from jet_launcher.processes import WorkerProcesses, worker_environment
from jet_launcher.run_directory import RunDirectory

# A run that selects nothing, so that stage 1 needs the placement only.
STAGES = ("--stages", "placement,stage1", "stages=[prepare,placement,stage1]", "stage1.init=teacher")


def run_arguments(teacher: Path, output: str = "runs/a", *more: str) -> tuple[str, ...]:
    return ("run", "tiny", f"teacher.path={teacher}", "--output", output, *STAGES, *more)


def wait_for(condition, seconds: float = 250.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def processes_named(word: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def stage_state(run: str, stage: str) -> str | None:
    path = Path(run) / "stages" / stage / "status.json"
    return json.loads(path.read_text())["state"] if path.exists() else None


def test_run_to_the_end_then_nothing_left_to_do(launcher, teacher):
    code, out, err = launcher(*run_arguments(teacher))
    assert (code, err) == (0, "")
    assert "forecast: about" in out and "on disk" in out
    assert out.index("placement: done") < out.index("stage1: done")
    results = {path: path.stat().st_mtime_ns for path in Path("runs/a/stages").glob("*/result.json")}
    assert {path.parent.name for path in results} == {"prepare", "placement", "stage1"}
    assert "stage1 step 9 rank 0" in Path("runs/a/stages/stage1/log.txt").read_text()
    assert "placement" not in Path("runs/a/stages/stage1/log.txt").read_text()
    code, out, _ = launcher("resume", "a")
    assert code == 0
    assert "placement: done" in out and "(already)" in out
    assert {path: path.stat().st_mtime_ns for path in results} == results


def test_provenance_holds_every_launch(launcher, teacher):
    launcher(*run_arguments(teacher))
    launcher("resume", "a")
    provenance = json.loads(Path("runs/a/provenance.json").read_text())
    first, second = provenance["launches"]
    assert first["stages"] == second["stages"] == ["prepare", "placement", "stage1"]
    assert len(first["git"]["revision"]) == 40
    assert {"pydantic", "torch"} <= set(first["packages"])
    assert first["hardware"]["cores"] == os.cpu_count()
    assert provenance["schema_version"] == 1


def test_failed_stage_says_why_and_stops_the_rest(launcher, teacher, monkeypatch):
    monkeypatch.setenv("STAND_IN", "placement=error")
    code, out, err = launcher(*run_arguments(teacher))
    assert code == 1
    assert "placement failed: ValueError: shard train-000003.tar is corrupt" in err
    assert "resume a" in err
    assert stage_state("runs/a", "stage1") is None
    monkeypatch.delenv("STAND_IN")
    code, out, err = launcher("resume", "a")
    assert code == 0
    assert "failed" not in out  # how the earlier launch ended is not news


def test_killed_worker_is_named_and_the_rerun_finishes(launcher, teacher, monkeypatch):
    monkeypatch.setenv("STAND_IN", "stage1=die")
    code, _, err = launcher(*run_arguments(teacher))
    assert code == 1
    assert "the worker was killed by SIGKILL" in err and "in stage1, step 5 of 10" in err
    assert "  | stage1 step 4 rank 0" in err
    assert "killed at step 5/10" in launcher("status", "a")[1]
    monkeypatch.delenv("STAND_IN")
    assert launcher("resume", "a")[0] == 0


def test_worker_that_ends_without_finishing_is_a_failure(launcher, teacher, monkeypatch):
    monkeypatch.setenv("STAND_IN", "placement=quiet")
    code, _, err = launcher(*run_arguments(teacher))
    assert code == 1
    assert "did not finish placement, stage1" in err


def test_worker_that_cannot_start_shows_its_log(launcher, teacher, monkeypatch):
    monkeypatch.setenv("JET_WORKER", "no_such_module")
    code, _, err = launcher(*run_arguments(teacher))
    assert code == 1
    assert "No module named no_such_module" in err and "ended with exit code 1" in err


def test_nothing_that_the_worker_started_is_left(launcher, teacher, monkeypatch):
    monkeypatch.setenv("STAND_IN", "placement=child")
    assert launcher(*run_arguments(teacher))[0] == 0
    assert not processes_named("sleep\x0061")


def test_leftovers_that_ignore_sigterm_are_killed(launcher, teacher, monkeypatch):
    monkeypatch.setattr("jet_launcher.local.LEFTOVER_GRACE", 0.5)
    monkeypatch.setenv("STAND_IN", "placement=stubborn")
    assert launcher(*run_arguments(teacher))[0] == 0
    wait_for(lambda: not processes_named("sleep\x0062"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_exits_75(start_launcher, teacher, number):
    process = start_launcher(*run_arguments(teacher), STAND_IN="placement=wait")
    wait_for(lambda: stage_state("runs/a", "placement") == "running")
    process.send_signal(number)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 75
    assert "interrupted in placement" in err and "resume a" in err
    assert stage_state("runs/a", "placement") == "interrupted"
    assert stage_state("runs/a", "stage1") is None


def test_second_interrupt_kills_a_worker_that_does_not_save(start_launcher, teacher):
    process = start_launcher(*run_arguments(teacher), STAND_IN="placement=stuck")
    log = Path("runs/a/stages/placement/log.txt")
    wait_for(lambda: log.exists() and "stuck" in log.read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 75, err
    assert not processes_named(str(Path("runs/a").resolve()))


def test_worker_saves_when_its_launcher_is_killed(start_launcher, teacher):
    process = start_launcher(*run_arguments(teacher), STAND_IN="placement=wait")
    wait_for(lambda: stage_state("runs/a", "placement") == "running")
    process.kill()
    wait_for(lambda: stage_state("runs/a", "placement") == "interrupted")
    wait_for(lambda: not processes_named(str(Path("runs/a").resolve())))


def test_two_launchers_do_not_share_a_run(start_launcher, launcher, teacher):
    process = start_launcher(*run_arguments(teacher), STAND_IN="placement=wait")
    wait_for(lambda: stage_state("runs/a", "placement") == "running")
    code, _, err = launcher("resume", "a")
    assert code == 1
    assert f"process {process.pid}" in err and "cancel a" in err
    assert launcher("list")[1].splitlines()[2].split()[:3] == ["a", "tiny", "running"]
    assert launcher("clean", "a", "--all")[0] == 1
    code, out, _ = launcher("cancel", "a")
    assert code == 0 and "stopped" in out
    process.communicate(timeout=250)
    assert process.returncode == 75
    assert "is not running" in launcher("cancel", "a")[1]


def test_two_processes_and_one_of_them_killed(launcher, teacher, monkeypatch):
    monkeypatch.setenv("STAND_IN", "stage1=die")
    code, _, err = launcher(*run_arguments(teacher, "runs/a", "nproc=2"))
    assert code == 1
    assert "killed by SIGKILL" in err and "stage1" in err
    assert not processes_named(str(Path("runs/a").resolve()))
    log = Path("runs/a/stages/stage1/log.txt").read_text()
    assert "rank 0" in log and "rank 1" in log


def test_two_processes_interrupted(start_launcher, teacher):
    process = start_launcher(*run_arguments(teacher, "runs/a", "nproc=2"), STAND_IN="placement=wait")
    wait_for(lambda: stage_state("runs/a", "placement") == "running")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 75, err
    assert not processes_named(str(Path("runs/a").resolve()))


def test_ranks_end_when_their_agent_is_killed(start_launcher, teacher):
    process = start_launcher(*run_arguments(teacher, "runs/a", "nproc=2"), STAND_IN="placement=wait")
    wait_for(lambda: stage_state("runs/a", "placement") == "running")
    # Other runs on this machine have agents as well.
    (agent,) = set(processes_named("torch.distributed.run")) & set(processes_named(str(Path("runs/a").resolve())))
    os.kill(agent, signal.SIGKILL)
    _, err = process.communicate(timeout=250)
    assert process.returncode == 1, err
    assert "killed by SIGKILL" in err
    assert not processes_named(str(Path("runs/a").resolve()))


def test_worker_environment_shares_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert worker_environment(2, tmp_path, {})["OMP_NUM_THREADS"] == "4"
    assert worker_environment(16, tmp_path, {})["OMP_NUM_THREADS"] == "1"
    assert worker_environment(2, tmp_path, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    path = worker_environment(1, tmp_path, {"PYTHONPATH": "/mine"})["PYTHONPATH"]
    assert path.split(os.pathsep) == [str(tmp_path / part) for part in ("", "kernels", "launcher")] + ["/mine"]


def test_full_disk_for_the_log_is_one_line(launcher, teacher, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WorkerProcesses, "__init__", full)
    code, _, err = launcher(*run_arguments(teacher))
    assert code == 1
    assert err.strip().splitlines() == [
        "error: runs/a: no space left on the disk; free some or give an --output on another one"
    ]
    assert RunDirectory(Path("runs/a")).config().recipe == "tiny"
