"""list, status, logs, clean on runs in every state."""

import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fake_run import write_fake_run
from jet_launcher.logs import show_log
from jet_launcher.progress import PlainDisplay, RichDisplay, describe, describe_end
from jet_launcher.run_directory import RunDirectory, open_run
from jet_launcher.stage_status import StageStatus, read_run, run_state
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_json
from megatron_jet.configs.lock import exclusive, lock_holder
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.stages import STAGE_ORDER


@pytest.fixture
def run(workplace) -> RunDirectory:
    return open_run(tiny(), Path("runs/a"))


def set_status(run: RunDirectory, stage: str, state: str, **fields) -> None:
    row = {"state": state, "pid": os.getpid(), "host": socket.gethostname(), "updated": "2026-03-01T10:00:00+00:00"}
    write_json(run.stage(stage) / "status.json", {**row, "measured": {"seconds": 12.0}, **fields})


def test_status_tells_states_apart(run, launcher):
    set_status(run, "prepare", "done")
    losses = {"feature": 0.25, "kl": 1.5}
    moment = datetime.now(UTC)
    pace = {"first_step": 10, "first_step_at": moment.timestamp() - 40, "updated": moment.isoformat()}
    set_status(run, "placement", "running", step=30, total_steps=120, losses=losses, job="supernet", **pace)
    code, out, _ = launcher("status", "a")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert code == 0
    assert "running" in out.splitlines()[0]
    assert "done in 12 s" in lines["prepare"]
    assert "running: supernet, step 30/120, feature 0.25, kl 1.5" in lines["placement"]
    assert "3 min left" in lines["placement"]  # 20 steps took 40 s, 90 are left
    assert lines["stage2"].split() == ["stage2", "pending"]


def test_stage_whose_process_is_gone_is_killed_not_running(run, launcher):
    pid = next(pid for pid in range(2**22 - 1, 2, -1) if not Path(f"/proc/{pid}").exists())
    set_status(run, "placement", "running", step=30, total_steps=120, pid=pid)
    body = json.loads(launcher("status", "a", "--json")[1])
    assert body["state"] == "killed"
    assert next(s for s in body["stages"] if s["stage"] == "placement")["state"] == "killed"


def test_stage_on_another_host_counts_as_running(run):
    set_status(run, "placement", "running", pid=1, host="some-other-node")
    statuses = read_run(run)
    assert run_state(run, statuses) == "running"


def test_run_states(run):
    assert run_state(run, read_run(run)) == "pending"
    set_status(run, "prepare", "done")
    assert run_state(run, read_run(run)) == "incomplete"
    set_status(run, "placement", "interrupted", message="SIGTERM")
    assert run_state(run, read_run(run)) == "interrupted"
    set_status(run, "placement", "failed", message="UserError: shard lost")
    assert run_state(run, read_run(run)) == "failed"
    for stage in STAGE_ORDER:
        set_status(run, stage, "done")
    assert run_state(run, read_run(run)) == "done"


def test_half_written_status_is_no_error(run, launcher):
    folder = run.stage("placement")
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "run')
    assert launcher("status", "a")[0] == 0


def test_list_shows_a_run_that_no_longer_parses(run, launcher):
    other = open_run(tiny(), Path("runs/b"))
    other.config_file.write_text("recipe: old\n")
    code, out, _ = launcher("list", "--json")
    runs = {row["id"]: row for row in json.loads(out)["runs"]}
    assert code == 0
    assert runs["a"]["state"] == "pending" and runs["a"]["stages"] == len(STAGE_ORDER)
    assert runs["b"]["state"] == "unreadable" and "placement" in runs["b"]["error"]


def test_empty_list_says_how_to_start(launcher):
    assert "no runs in runs/; start one with" in launcher("list")[1]


def test_logs_show_the_latest_stage_or_the_one_named(run, launcher):
    for stage, moment in (("prepare", "2026-03-01T10:00:00+00:00"), ("placement", "2026-03-01T11:00:00+00:00")):
        set_status(run, stage, "done", updated=moment)
        (run.stage(stage) / "log.txt").write_text(f"log of {stage}\n")
    assert launcher("logs", "a")[1] == "log of placement\n"
    assert launcher("logs", "a", "prepare")[1] == "log of prepare\n"
    code, _, err = launcher("logs", "a", "stage1")
    assert code == 1 and "stage1 of a has no log yet" in err
    code, _, err = launcher("logs", "a", "stage7")
    assert code == 2 and "unknown stage 'stage7'" in err


def test_following_a_log_goes_on_into_the_next_stage_and_ends_with_the_run(run, tmp_path):
    set_status(run, "prepare", "done")
    (run.stage("prepare") / "log.txt").write_text("one\n")
    copy = (tmp_path / "copy").open("w")

    def until_copied(text: str) -> None:
        deadline = time.monotonic() + 200
        while text not in (tmp_path / "copy").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with run.locked():
        follower = threading.Thread(target=show_log, args=(run, None, True, copy))
        follower.start()
        until_copied("one")
        with (run.stage("prepare") / "log.txt").open("a") as log:
            log.write("two\n")
        until_copied("two")
        set_status(run, "placement", "running", updated="2026-03-02T10:00:00+00:00")
        (run.stage("placement") / "log.txt").write_text("three\n")
    follower.join(timeout=200)
    assert not follower.is_alive()
    copy.close()
    assert (tmp_path / "copy").read_text() == "one\ntwo\nthree\n"


def test_clean_keeps_what_results_name(run, launcher):
    for stage in ("placement", "stage1"):
        set_status(run, stage, "done")
        for name in ("step_10", "final"):
            folder = run.stage(stage) / "checkpoints" / name
            folder.mkdir(parents=True)
            (folder / "weights").write_bytes(b"x" * 1000)
    named = {"stage": "stage1", "checkpoint": "stages/stage1/checkpoints/final", "measured": {"seconds": 1}}
    write_json(run.stage("stage1") / "result.json", named)
    unfinished = run.stage("stage2") / "checkpoints" / "step_5"
    unfinished.mkdir(parents=True)
    set_status(run, "stage2", "interrupted")

    code, out, _ = launcher("clean", "a", "--dryrun")
    assert code == 0 and "3000 B would be freed" in out
    assert (run.stage("placement") / "checkpoints" / "final").is_dir()
    code, out, _ = launcher("clean", "a")
    assert "3000 B freed" in out
    assert not (run.stage("placement") / "checkpoints").exists()
    assert [path.name for path in (run.stage("stage1") / "checkpoints").iterdir()] == ["final"]
    assert unfinished.is_dir()
    assert launcher("clean", "a", "--all")[0] == 0
    assert not run.path.exists()


def test_clean_all_of_a_linked_run_removes_the_run_and_not_just_the_link(run, launcher):
    """Runs in a cluster's job directory have a link in runs/."""
    real = run.path.rename("elsewhere").resolve()
    run.path.symlink_to(real)
    (real / "weights").write_bytes(b"x" * 5000)
    code, out, _ = launcher("clean", "a", "--all", "--dryrun")
    assert code == 0 and real.is_dir() and "KiB would be freed" in out
    assert launcher("clean", "a", "--all")[0] == 0
    assert not real.exists() and not run.path.is_symlink()


def test_report_of_a_run_that_has_only_started(launcher):
    write_fake_run(Path("runs/b"), ())
    assert launcher("report", "b")[0] == 0
    assert "not finished" in Path("runs/b/report.html").read_text()
    assert launcher("status", "b")[1].splitlines()[-1] == "report: runs/b/report.html"


def test_lock_ends_with_its_holder(tmp_path):
    path = tmp_path / ".lock"
    assert lock_holder(path) is None
    with exclusive(path):
        assert lock_holder(path).pid == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()}"), exclusive(path):
            pass
    assert lock_holder(path) is None
    with exclusive(path):
        pass


def test_descriptions():
    row = {"step": 50, "total_steps": 200, "losses": {"kl": 0.123456}, "tokens_per_second": 2310.0}
    assert describe(StageStatus("stage1", "running", **row)) == "step 50/200, kl 0.1235, 2,310 tokens/s"
    assert describe_end(StageStatus("stage1", "done", seconds=77.0)) == "done in 77 s"
    assert describe_end(StageStatus("stage1", "failed", "", 5, 10, error="no")) == "failed at step 5/10: no"


def test_plain_display_speaks_on_changes_only(tmp_path):
    stream = (tmp_path / "out").open("w+")
    display = PlainDisplay(stream)
    running = StageStatus("stage1", "running", "warm-up", updated=time.time())
    for _ in range(5):
        display.update([StageStatus("prepare", "done", seconds=3.0), running, StageStatus("stage2")])
    display.update([StageStatus("prepare", "done", seconds=3.0), StageStatus("stage1", "done", seconds=9.0)])
    display.close()
    stream.seek(0)
    lines = [line.partition("] ")[2].strip() for line in stream]
    assert lines == ["prepare: done in 3 s (already)", "stage1: warm-up", "stage1: done in 9 s"]


def test_plain_display_is_quiet_while_there_is_nothing_new(tmp_path, monkeypatch):
    monkeypatch.setattr("jet_launcher.progress.PLAIN_INTERVAL", 0.0)
    stream = (tmp_path / "out").open("w+")
    display = PlainDisplay(stream)
    for step in (1, 1, 1, 2, 2, 2):
        display.update([StageStatus("stage1", "running", "", step, 3)])
    monkeypatch.setattr("jet_launcher.progress.PLAIN_SILENCE", 0.0)
    display.update([StageStatus("stage1", "running", "", 2, 3)])
    display.close()
    stream.seek(0)
    assert [line.rpartition("step ")[2].strip() for line in stream] == ["1/3", "2/3", "2/3"]


def test_rich_display_draws_every_state(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    display = RichDisplay()
    states = ("done", "running", "failed", "interrupted", "killed", "pending")
    display.update([StageStatus(f"stage{i}", state, "", 1, 2) for i, state in enumerate(states)])
    display.note("stopping [now]")
    display.close()
    out = capsys.readouterr().out
    assert all(f"stage{i}" in out for i in range(len(states)))
    assert "stopping [now]" in out
