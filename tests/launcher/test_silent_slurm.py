"""A Slurm that does not answer is no empty queue; and other words of Slurm that must not be overheard."""

import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jet_launcher.cli import main
from jet_launcher.exit_codes import USAGE
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm import commands, launch, plain
from jet_launcher.slurm.launch import wait_for

SILENT = "Slurm does not answer (slurm_load_jobs error: Socket timed out on send/recv operation)"


@pytest.fixture
def run(place):
    """A run with one job, 11, that runs."""
    assert place.plain() == 0
    place.slurm.add("11", "RUNNING", nodes="n1")
    return place


@pytest.fixture
def say(capsys):
    """Call the launcher: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        return (code, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    "command", [["cancel", "a"], ["clean", "a", "--all"], ["resume", "a"], ["resume", "a", "--cluster", "local"]]
)
def test_silence_stops_whatever_must_know_the_queue(run, say, command):
    run.slurm.steer(silent="")
    before = run.record
    code, out, err = say(*command)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {SILENT}, so nobody can tell which jobs wait or run") and err.count("\n") == 1
    assert run.record == before and (run.run / "config.yaml").is_file()
    assert run.slurm.said("cancelled") == ""


def test_plain_script_does_not_submit_into_silence(run, capsys):
    run.slurm.steer(silent="")
    assert run.plain() == 1
    assert SILENT in capsys.readouterr().err
    assert list(run.slurm.states()) == ["11"]


def test_status_and_list_say_so_and_show_what_files_tell(run, say):
    run.slurm.steer(silent="")
    code, out, _ = say("status", "a")
    assert code == 0
    assert out.splitlines()[0].endswith("a: unknown on " + str(run.cluster))
    assert f"{SILENT}: only what files" in out.splitlines()[-1]
    body = json.loads(say("status", "a", "--json")[1])
    assert (body["state"], body["slurm_error"]) == ("unknown", SILENT.partition("(")[2].removesuffix(")"))
    code, out, err = say("list")
    assert code == 0 and out.splitlines()[2].split()[2] == "unknown"
    assert err == SILENT + "\n"
    (run.run / "stages" / "stage1").mkdir(parents=True, exist_ok=True)
    (run.run / "stages" / "stage1" / "result.json").write_text("{}")
    assert "a: done on" in say("status", "a")[1], "a result is a result"
    run.slurm.relent("silent")
    assert json.loads(say("status", "a", "--json")[1])["slurm_error"] is None


def test_waiting_outlasts_silence(run, capsys):
    run.slurm.steer(silent="")
    _Lines.all.clear()
    codes = []
    thread = threading.Thread(target=lambda: codes.append(wait_for(RunDirectory(run.run), _Lines(), 0.05)))
    thread.start()
    deadline = time.monotonic() + 200
    while not any("does not answer" in line for line in _Lines.all):
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    thread.join(0.2)
    assert thread.is_alive(), "silence is no end"
    run.slurm.relent("silent")
    thread.join(0.2)
    assert thread.is_alive(), "the job still runs"
    (run.run / "stages" / "stage1").mkdir(parents=True, exist_ok=True)
    (run.run / "stages" / "stage1" / "result.json").write_text("{}")
    run.slurm.add("11", "COMPLETED")
    thread.join(200)
    assert codes == [0]
    said = [line for line in _Lines.all if "does not answer" in line]
    assert len(said) == 1 and "; still waiting" in said[0]


def test_waiting_says_that_a_job_is_held(run, capsys, monkeypatch):
    run.slurm.add("11", "PENDING", "launch failed requeued held")
    polls = iter(range(3))

    def let_go(seconds):
        if next(polls) == 1:
            run.slurm.add("11", "CANCELLED")

    clock = SimpleNamespace(sleep=let_go, strftime=time.strftime)  # its own: subprocess sleeps, too
    monkeypatch.setattr(launch, "time", clock)
    assert wait_for(RunDirectory(run.run), _Lines(), 0.05) == 1
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: stage1 (job 11) waits for launch failed requeued held: Slurm holds it (a node failed to launch it); "
        "`scontrol release 11`"
    ]


def test_log_of_the_newest_attempt_that_wrote_something_is_shown(run, say):
    """On a full disk, logs are made and stay empty."""
    logs = run.run / "stages" / "stage1" / "logs"
    (logs / "stage1.11.0.n1.log").write_text("OSError: No space left on device\n")
    (logs / "stage1.11.1.n1.log").touch()
    attempts = run.run / "cluster" / "attempts"
    attempts.mkdir(parents=True)
    (attempts / "stage1.log").write_text("1 start 11 0 0-0 1 n1\n2 start 11 1 0-0 1 n1\n")
    assert say("logs", "a", "stage1")[1] == "OSError: No space left on device\n"


class _Lines:
    """A stream."""

    all: list[str] = []

    def write(self, text: str) -> None:
        self.all.append(text)

    def flush(self) -> None: ...


def test_forgotten_job_is_not_silence(run, say):
    """squeue fails when it is asked about a single job that it has forgotten."""
    run.slurm.forget("11")
    assert say("cancel", "a")[:2] == (0, "a has no jobs in the queue\n")
    assert "stage1  unknown" in say("status", "a")[1]
    assert say("clean", "a", "--all")[0] == 0
    assert not run.run.exists()


def test_refusal_of_scancel_is_an_error(run, say):
    run.slurm.steer(denied="11")
    code, out, err = say("cancel", "a")
    assert (code, out) == (1, "")
    assert err == "error: scancel: error: Kill job error on job id 11: Access/permission denied\n"


def test_cancel_counts_what_it_cancelled(run, say, monkeypatch):
    assert run.plain("stage2") == 0
    stop = commands.slurm.cancel_jobs

    def one_ends_first(ids):
        run.slurm.forget("11")
        stop(ids)
        run.slurm.add("11", "COMPLETED")

    monkeypatch.setattr(commands.slurm, "cancel_jobs", one_ends_first)
    code, out, _ = say("cancel", "a")
    assert code == 0 and out.startswith("a: 1 jobs cancelled (1 had ended before); continue with")


def test_cancel_waits_through_a_silence(run, say, monkeypatch):
    monkeypatch.setattr(commands, "FOLLOW_SECONDS", 0.05)
    stop = commands.slurm.cancel_jobs

    def silence_follows(ids):
        stop(ids)
        run.slurm.steer(silent="")
        threading.Timer(0.5, run.slurm.relent, ["silent"]).start()

    monkeypatch.setattr(commands.slurm, "cancel_jobs", silence_follows)
    assert "1 jobs cancelled" in say("cancel", "a")[1]


def test_plain_job_is_one_of_the_runs_jobs(run, say, capsys):
    assert run.plain() == 1
    assert "a: stage1 is in the queue or running (job 11); `cancel a` first" in capsys.readouterr().err
    assert list(run.slurm.states()) == ["11"]
    row = say("status", "a")[1].splitlines()[3].split()
    assert row[:4] == ["stage1", "running", "11", "n1"]
    log = run.run / "stages" / "stage1" / "logs" / "stage1.11.batch.log"
    log.write_text("starting\n")
    assert say("logs", "a", "stage1")[1] == "starting\n"
    assert "jobs are in the queue or running (stage1)" in say("clean", "a", "--all")[2]
    assert "1 jobs cancelled" in say("cancel", "a")[1]
    assert run.plain() == 0, "a cancelled one is no obstacle"
    assert [len(entry["jobs"]) for entry in run.record["submissions"]] == [1, 1]


def test_plain_jobs_options_are_the_cluster_files_and_the_users(place, monkeypatch):
    monkeypatch.setenv("SBATCH_EXTRA", "--dependency=afterok:7 --comment='two words'")
    assert place.plain() == 0
    options = (place.slurm.folder / "options" / "11").read_text()
    assert "--requeue" in options and "--job-name=a.stage1" in options and "--signal=USR1@" in options
    assert "--dependency=afterok:7 --comment=two words" in options
    assert re.search(r"slurm/postnas.sbatch --in-job \S+/cluster/plain/stage1.sh$", options.strip())
    monkeypatch.setenv("SBATCH_EXTRA", "--comment='two")
    assert place.plain("stage2") == USAGE


def test_plain_script_refused_by_sbatch(place, capsys):
    place.slurm.steer(refused=1)
    assert place.plain() == 1
    assert "error: submission failed: sbatch: error: Invalid qos specification; nothing was" in capsys.readouterr().err
    assert place.record["submissions"] == []
    assert plain.live_jobs is launch.live_jobs


INCOMPLETE = (
    "{}",
    "[]",
    "null",
    '{"name": "c", "cluster": {}}',
    '{"name": "c", "submissions": []}',
    '{"name": "c", "cluster": {}, "submissions": [{}]}',
    '{"name": "c", "cluster": {}, "submissions": [{"jobs": [{"job_id": "1"}]}]}',
)


@pytest.mark.parametrize("content", INCOMPLETE)
def test_incomplete_record_is_one_line_and_hides_no_other_run(run, say, content):
    (run.run / "cluster" / "experiment.json").write_text(content)
    for command in (["status", "a"], ["cancel", "a"], ["clean", "a"], ["logs", "a"], ["resume", "a"]):
        code, _, err = say(*command)
        assert code == 1 and err.count("\n") == 1
        assert re.match(r"error: .*experiment\.json: (is not a complete record|.* missing)", err), err
    Path("runs/b").mkdir()
    Path("runs/b/config.yaml").write_text((run.run / "config.yaml").read_text())
    rows = {line.split()[0]: line.split()[2] for line in say("list")[1].splitlines()[2:]}
    assert rows == {"a": "unreadable", "b": "pending"}


def test_following_the_log_of_a_job_that_has_ended_ends_at_once(run, say, monkeypatch):
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("waited"))
    monkeypatch.setattr(commands, "time", clock)  # its own: subprocess sleeps, too
    (run.run / "stages" / "stage1" / "logs" / "stage1.11.0.n1.log").write_text("last words\n")
    attempts = run.run / "cluster" / "attempts"
    attempts.mkdir(parents=True)
    (attempts / "stage1.log").write_text("1 start 11 0 0-0 1 n1\n")
    run.slurm.add("11", "FAILED", nodes="n1")
    for command in (["logs", "a", "-f"], ["logs", "a", "stage1", "-f"]):
        code, out, err = say(*command)
        assert (code, out) == (0, "last words\n")
        assert err.startswith("stage1: failed")
