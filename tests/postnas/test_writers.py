"""One writer per stage, attempts that leave, and ranks that watch each other: processes that do nothing else."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_jet.configs.attempts import SupersededError, leave_if_superseded, superseded
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.configs.lock import exclusive
from megatron_jet.configs.ticks import tick
from megatron_jet.postnas import standstill as standing
from megatron_jet.postnas import writers

# Stands for the worker: holds the stage and says so. Stopped or not, it holds it until it ends.
HOLDER = """
import sys, time
from pathlib import Path
from megatron_jet.postnas.writers import stage_writer
with stage_writer(Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None, 0.0):
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Start a worker that holds a stage of `tmp_path`."""
    started = []

    def start(stage: str, candidate: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), stage, candidate]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def work_on(run: Path, stage: str, candidate: str | None = None) -> None:
    with writers.stage_writer(run, stage, candidate, 0.0):
        pass


def test_a_second_worker_is_refused_also_while_the_first_is_stopped(tmp_path, hold):
    first = hold("stage1")
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match=f"stages/stage1: process {first.pid} on .*kill -CONT"):
        work_on(tmp_path, "stage1")
    work_on(tmp_path, "stage2")
    first.kill()
    first.wait()
    work_on(tmp_path, "stage1")


def test_candidates_work_side_by_side_but_not_beside_their_stage(tmp_path, hold):
    candidate = hold("block_selection", "jet")
    work_on(tmp_path, "block_selection", "gla")
    for other in (None, "jet"):
        with pytest.raises(UserError, match=f"process {candidate.pid} "):
            work_on(tmp_path, "block_selection", other)
    candidate.kill()
    candidate.wait()
    stage = hold("block_selection")
    with pytest.raises(UserError, match=f"process {stage.pid} .* works on block_selection"):
        work_on(tmp_path, "block_selection", "jet")


def test_ranks_of_a_larger_worker_count_as_well(tmp_path):
    """The one that still lives may be rank 3 of four, and the new worker has one."""
    (tmp_path / "locks").mkdir()
    with exclusive(tmp_path / "locks" / "stage1@3"), pytest.raises(UserError, match=f"process {os.getpid()} "):
        work_on(tmp_path, "stage1")


def test_a_launched_worker_waits_for_the_last_one_to_save_and_leave(tmp_path, hold, monkeypatch):
    first = hold("stage1")
    monkeypatch.setenv(writers.LAUNCHED, "token")
    real = time.sleep

    def leave_meanwhile(seconds: float) -> None:
        first.kill()
        first.wait()
        real(0)

    monkeypatch.setattr(writers.time, "sleep", leave_meanwhile)
    work_on(tmp_path, "stage1")


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """This process is attempt 0 of job 5."""
    log = tmp_path / "cluster" / "attempts" / "stage1.log"
    log.parent.mkdir(parents=True)
    log.write_text("100 start 5 0 1-1 1 n1\n")
    for name, value in {"POSTNAS_RUN_DIR": tmp_path, "POSTNAS_JOB": "stage1", "SLURM_JOB_ID": "5"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return log


@pytest.mark.parametrize("line", ["101 start 5 1 1-1 1 n2", "101 start 6 0 1-1 1 n2"])
def test_an_attempt_leaves_once_another_has_started(attempt, line):
    assert superseded() is None
    attempt.write_text(attempt.read_text() + "100 end 5 0 1-1 75 interrupted\n")
    leave_if_superseded()
    attempt.write_text(attempt.read_text() + line + "\n")
    with pytest.raises(SupersededError, match=r"has taken over from attempt 0 of job 5"):
        leave_if_superseded()


def test_an_odd_log_of_attempts_fences_nobody(attempt):
    for content in (b"", b"\xff\0\n", b"start\n", b"101 start 9 0 1-1 1 n2\n"):
        attempt.write_bytes(content)
        assert superseded() is None
    attempt.unlink()
    assert superseded() is None


def test_the_newer_attempt_goes_on_beside_an_old_one_that_may_not_write(tmp_path, hold, attempt, monkeypatch, capsys):
    hold("stage1")
    monkeypatch.setattr(writers, "LEAVING_SECONDS", 0.0)
    work_on(tmp_path, "stage1")
    assert "is of an earlier attempt, and this one goes on" in capsys.readouterr().out


# Two ranks that meet by files instead of a process group.
RANK = """
import os, sys, time
from pathlib import Path
from megatron_jet.configs.ticks import tick
from megatron_jet.postnas import standstill as standing
from megatron_jet.postnas import writers

run, number, meetings = Path(sys.argv[1]), int(os.environ["NUMBER"]), []

def gather(value):
    meetings.append(value)
    (run / f"{len(meetings)}.{number}").touch()
    while not (run / f"{len(meetings)}.{1 - number}").exists():
        time.sleep(0.01)
    return [value]

writers.rank, writers.world_size, writers.gather = lambda: number, lambda: 2, gather
writers.stacks_on_demand()

def works_alone():
    print("works", flush=True)
    while not (run / f"sleep{number}").exists():  # in small pieces, as work is: it is found here and there
        sum(range(number % 7, 100_000))
        max(range(100_000))
        min(range(100_000))
    if sys.argv[3] == "collective":
        all_reduce()
    while True:
        time.sleep(600)

# Its file says that it is torch's.
exec(compile("def all_reduce(): time.sleep(600)", "torch/distributed/distributed_c10d.py", "exec"), globals())

with writers.stage_writer(run, "export", None, float(sys.argv[2])):
    works_alone()
"""


@pytest.fixture
def two_ranks(tmp_path, request):
    (tmp_path / "stages" / "export").mkdir(parents=True)
    write_json(tmp_path / "stages" / "export" / "status.json", {"state": "running", "pid": 1})
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), "4", getattr(request, "param", "")],
            env={**os.environ, "NUMBER": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    for process in ranks:
        assert process.stdout.readline() == "works\n"
    yield ranks
    for process in ranks:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("wedged", [0, 1])
def test_a_stopped_rank_ends_all_with_its_name_and_stacks(two_ranks, tmp_path, wedged):
    os.kill(two_ranks[wedged].pid, signal.SIGSTOP)
    said = [process.communicate(timeout=300)[1] for process in two_ranks]
    name = f"rank {wedged} (process {two_ranks[wedged].pid} on {socket.gethostname()}) has not moved for 4 seconds"
    for number, text in enumerate(said):
        assert f"error: {name}" in text
        assert f"stacks of rank {number} " in text and "in works_alone" in text
    assert [process.returncode for process in two_ranks] == [1, 1]
    status = read_json(tmp_path / "stages" / "export" / "status.json")
    assert status["state"] == "failed" and status["message"].startswith(name)


@pytest.mark.parametrize(("two_ranks", "stuck"), [("", 1), ("collective", 0)], indirect=["two_ranks"])
def test_a_rank_that_lives_and_gets_nowhere_ends_all_as_well(two_ranks, tmp_path, stuck, request):
    """It sleeps for ever, say: its threads run, and it beats. One in a collective waits for the other, which works."""
    collective = "collective" in request.node.callspec.id
    (tmp_path / f"sleep{stuck}").touch()
    if collective:
        record = tmp_path / "locks" / f"export@{stuck}"
        while float(read_json(record)["still"]) < 8:  # twice the limit
            assert all(process.poll() is None for process in two_ranks)
            time.sleep(0.05)
        (tmp_path / f"sleep{1 - stuck}").touch()  # now both wait, which nobody will end
    said = [process.communicate(timeout=300)[1] for process in two_ranks]
    name = f"rank {stuck} (process {two_ranks[stuck].pid} on {socket.gethostname()}) has not moved for 4 seconds"
    for number, text in enumerate(said):
        assert f"error: {name}" in text
        assert f"stacks of rank {number} " in text and "in works_alone" in text
    assert [process.returncode for process in two_ranks] == [1, 1]
    status = read_json(tmp_path / "stages" / "export" / "status.json")
    assert status["state"] == "failed" and status["message"].startswith(name)


def test_reading_and_ticks_are_no_standstill(tmp_path):
    """Of a main thread that waits at one place, for a thread that hashes a large file or for a slow disk."""
    standstill, looks = standing.Standstill(), []
    (tmp_path / "file").write_bytes(bytes(2 << 20))

    def look_on() -> None:
        for meanwhile in (None, None, (tmp_path / "file").read_bytes, None, None):
            if meanwhile:
                meanwhile()
            standstill.look(starved=False)
            looks.append(standstill.looks)

    thread = threading.Thread(target=look_on)
    thread.start()
    thread.join()
    assert looks[1:] == [1, 0, 1, 2] or looks == [0, 0, 0, 1, 2]  # at the first looks it may still be on its way there
    tick()
    thread = threading.Thread(target=look_on)
    thread.start()
    thread.join()
    assert looks[5] == 0


def test_a_job_that_was_suspended_as_a_whole_goes_on(two_ranks, tmp_path):
    """As by `scontrol suspend`: time has passed, and nobody is wedged."""
    for process in two_ranks:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(6)  # longer than the limit
    for process in two_ranks:
        os.kill(process.pid, signal.SIGCONT)
    records = [tmp_path / "locks" / f"export@{number}" for number in (0, 1)]
    before = [record.read_text() for record in records]
    while any(record.read_text() == text for record, text in zip(records, before)):
        assert all(process.poll() is None for process in two_ranks)
        time.sleep(0.05)
    assert not (tmp_path / "locks" / "export.wedged").exists()
    os.kill(two_ranks[0].pid, signal.SIGUSR2)
    while "works_alone" not in two_ranks[0].stderr.readline():  # stacks on demand
        pass
