"""What users see of their jobs, from what Slurm's commands print."""

import time

import pytest

from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm import overview, state
from jet_launcher.slurm.graph import Job
from jet_launcher.slurm.overview import job_views, run_word, views_text
from jet_launcher.slurm.record import ClusterRecord
from jet_launcher.slurm.state import SlurmJob, merge, parse_sacct, parse_squeue
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.files import write_json
from megatron_jet.configs.training import ParallelConfig

SQUEUE = """12|RUNNING|None|n[1-2]|2026-11-21T06:00:00
13|PENDING|Dependency||N/A
14|PENDING|BeginTime||2026-11-21T06:02:00
15|CANCELLED|None||2026-11-21T06:02:00
"""
SACCT = """12|NODE_FAIL|0:0|100|2|n[3-4]
12|RUNNING|0:0|50|2|n[1-2]
16|CANCELLED by 0|0:0|0|1|None assigned
17|FAILED|1:0|30|1|n1
18|COMPLETED|0:0|7|1|n1
18.batch|COMPLETED|0:0|7|1|n1
"""


def test_squeue_and_sacct_together():
    ids = ["12", "13", "14", "15", "16", "17", "18", "19"]
    jobs = merge(ids, parse_squeue(SQUEUE), parse_sacct(SACCT))
    words = [jobs[i].state for i in ids]
    assert words == ["running", "pending", "pending", "cancelled", "cancelled", "failed", "done", "unknown"]
    assert jobs["12"].node_seconds == 300.0, "both attempts, two nodes each"
    assert (jobs["12"].nodes, jobs["14"].start) == ("n[1-2]", "2026-11-21T06:02:00")
    assert jobs["17"].reason == "exit code 1:0"
    assert jobs["16"].node_seconds == 0.0


def test_every_word_of_slurm_has_a_meaning():
    for word in ("TIMEOUT", "OUT_OF_MEMORY", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"):
        assert parse_sacct(f"1|{word}|0:0|1|1|n1")["1"].state == "failed"
    for word in ("CONFIGURING", "COMPLETING", "SUSPENDED"):
        assert parse_squeue(f"1|{word}|None|n1|N/A")["1"].live


def test_no_slurm_here_is_no_word_about_jobs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(state.NoAnswer, match=r"\(squeue: No such file or directory\)"):
        state.query_jobs(["1"])
    assert state.query_jobs([]) == {}


def job(name: str, *depends: str, gpus: int = 8) -> dict:
    layout = ParallelConfig().to_dict()
    fields = {"name": name, "target": name, "stage": name, "nodes": 2, "nproc": 8, "gpus": gpus, "depends": depends}
    return {**fields, "layout": layout, "tokens": 0, "gpu_hours": None}


@pytest.fixture
def views_of(tmp_path, monkeypatch):
    """Views of three chained jobs 1, 2, 3 for what Slurm says about them."""
    chain = [job("stage1"), job("stage2", "stage1"), job("export", "stage2")]
    rows = [{"job_id": str(i + 1), "job": row} for i, row in enumerate(chain)]
    record = ClusterRecord("c", ClusterConfig(), [{"experiment": "e_1", "nemorun_home": "/h", "jobs": rows}])
    run = RunDirectory(tmp_path)

    def views(*slurm: SlurmJob):
        monkeypatch.setattr(overview, "query_jobs", lambda ids, since=None: {job.job_id: job for job in slurm})
        return job_views(run, record)

    views.path = tmp_path
    return views


def attempt(path, name: str, *lines: str) -> None:
    folder = path / "cluster" / "attempts"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.log").write_text("\n".join(lines) + "\n")


def test_failed_stage_tells_its_dependents_why(views_of):
    attempt(
        views_of.path,
        "stage1",
        "1 start 1 0 0-0 2 n[1-2]",
        "2 end 1 0 0-0 1 crashed",
        "3 failed 1 0 0-0 1 crashed, twice",
    )
    write_json(
        views_of.path / "stages" / "stage1" / "status.json", {"state": "failed", "message": "ValueError: no data"}
    )
    views = views_of(
        SlurmJob("1", "failed", "FAILED", "", "n[1-2]", "", 3600.0),
        SlurmJob("2", "cancelled"),
        SlurmJob("3", "cancelled"),
    )
    assert views[0].note == "crashed, twice: ValueError: no data"
    assert views[0].gpu_hours == 8.0
    assert views[2].note == "not started: stage1 failed (crashed, twice: ValueError: no data)"
    assert run_word(views) == "failed"
    assert "not started: stage1 failed" in views_text(views)


def test_job_that_waits_for_its_restart(views_of):
    attempt(views_of.path, "stage1", "1 start 1 0 0-0 2 n[1-2]", "2 end 1 0 0-0 75 interrupted, saved")
    views = views_of(
        SlurmJob("1", "pending", "PENDING", "BeginTime"), SlurmJob("2", "pending"), SlurmJob("3", "pending")
    )
    assert views[0].restarts == 1
    assert views[0].note == "waits to go on after: interrupted, saved (BeginTime)"
    assert run_word(views) == "pending"


def test_running_job_shows_its_progress(views_of):
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    status = {"state": "running", "step": 20, "total_steps": 100, "losses": {"kl": 0.5}, "measured": {"seconds": 10}}
    status |= {"first_step": 0, "first_step_at": time.time() - 10, "updated": now}
    write_json(views_of.path / "stages" / "stage1" / "status.json", status)
    views = views_of(
        SlurmJob("1", "running", "RUNNING", "", "n[1-2]"), SlurmJob("2", "pending"), SlurmJob("3", "pending")
    )
    row = next(line for line in views_text(views).splitlines() if line.startswith("stage1"))
    for word in ("running", "n[1-2]", "step 20/100", "kl 0.5", "left"):
        assert word in row


def test_done_needs_a_result(views_of):
    done = [SlurmJob(str(i), "done", "COMPLETED") for i in (1, 2, 3)]
    assert [view.state for view in views_of(*done)] == ["failed"] * 3, "left with 0 but wrote nothing"
    for name in ("stage1", "stage2", "export"):
        write_json(views_of.path / "stages" / name / "result.json", {})
    views = views_of(*done)
    assert run_word(views) == "done"
    # Slurm forgets old jobs; results stay.
    assert run_word(views_of(*(SlurmJob(str(i)) for i in (1, 2, 3)))) == "done"


def test_one_failed_and_others_still_running_is_running(views_of):
    views = views_of(SlurmJob("1", "failed", "FAILED"), SlurmJob("2", "running", "RUNNING"), SlurmJob("3", "pending"))
    assert run_word(views) == "running"


def test_cancelled_while_running_is_not_blamed_on_others(views_of):
    views = views_of(
        SlurmJob("1", "cancelled", "CANCELLED", "", "n1"), SlurmJob("2", "cancelled"), SlurmJob("3", "cancelled")
    )
    assert views[0].note == "cancelled"
    assert views[1].note == "not started: stage1 cancelled"


def test_later_submission_replaces_a_job_and_its_hours_add_up(tmp_path, monkeypatch):
    rows = [[{"job_id": i, "job": job("stage1")}] for i in ("1", "5")]
    record = ClusterRecord("c", ClusterConfig(), [{"experiment": "e_1", "nemorun_home": "/h", "jobs": r} for r in rows])
    assert [(entry.job.name, entry.job_id) for entry in record.jobs] == [("stage1", "5")]
    said = {i: SlurmJob(i, "done", node_seconds=1800.0) for i in ("1", "5")}
    monkeypatch.setattr(overview, "query_jobs", lambda ids, since=None: said)
    assert job_views(RunDirectory(tmp_path), record)[0].gpu_hours == 8.0


def test_candidates_stand_before_the_job_that_ranks_them():
    rows = [
        job("block_selection"),
        {**job("block_selection-jet"), "stage": "block_selection", "target": "block_selection:jet"},
    ]
    submissions = [{"jobs": [{"job_id": str(i), "job": row} for i, row in enumerate([job("stage1"), *rows])]}]
    names = [entry.job.name for entry in ClusterRecord("c", ClusterConfig(), submissions).jobs]
    assert names == ["block_selection-jet", "block_selection", "stage1"]
    assert isinstance(ClusterRecord("c", ClusterConfig(), submissions).jobs[0].job, Job)


@pytest.mark.parametrize(
    "word, reason, said",
    [
        ("PENDING", "launch failed requeued held", "Slurm holds it (a node failed to launch it); `scontrol release 1`"),
        ("PENDING", "job requeued in held state", "`scontrol release 1`"),
        ("PENDING", "JobHeldUser", "`scontrol release 1`"),
        ("PENDING", "JobHoldMaxRequeue", "`scontrol release 1`"),
        ("REQUEUE_HOLD", "BeginTime", "`scontrol release 1`"),
        ("PENDING", "JobHeldAdmin", "held by an administrator"),
    ],
)
def test_held_job_says_how_to_go_on_and_promises_no_start(views_of, word, reason, said):
    held = parse_squeue(f"1|{word}|{reason}||2026-11-27T21:35:54")["1"]
    note = views_of(held, SlurmJob("2", "pending"), SlurmJob("3", "pending"))[0].note
    assert said in note and "expected" not in note
    assert (
        "expected"
        in views_of(
            parse_squeue("1|PENDING|Priority||2026-11-27T21:35:54")["1"],
            SlurmJob("2", "pending"),
            SlurmJob("3", "pending"),
        )[0].note
    )


def test_held_job_of_a_named_cluster():
    assert overview.stuck_reason(SlurmJob("7;gpu", "pending", "PENDING", "JobHeldUser")).endswith(
        "`scontrol -M gpu release 7`"
    )


def test_progress_of_the_last_attempt_is_not_shown_for_the_next(views_of):
    """Its preflight may take minutes."""
    status = {"state": "running", "step": 35, "total_steps": 400, "losses": {"kl": 0.5}, "measured": {"seconds": 10}}
    status |= {"first_step": 0, "first_step_at": 900, "updated": "1970-01-01T00:16:40+00:00"}  # 1000
    file = views_of.path / "stages" / "stage1" / "status.json"
    write_json(file, status)
    others = (SlurmJob("2", "pending"), SlurmJob("3", "pending"))

    def row() -> str:
        views = views_of(SlurmJob("1", "running", "RUNNING", "", "n1"), *others)
        assert views[0].to_dict()["progress"]["step"] in (0, 36)
        return next(line for line in views_text(views).splitlines() if line.startswith("stage1"))

    attempt(views_of.path, "stage1", "800 start 1 0 0-0 2 n1", "1001 start 1 1 0-0 2 n1")
    assert row().endswith("  starting (was at step 35/400)")
    (views_of.path / "cluster" / "preflight" / "1.1").mkdir(parents=True)
    assert row().endswith("  preflight (was at step 35/400)")
    (file.parent / "logs").mkdir()
    (file.parent / "logs" / "stage1.1.1.n1.log").touch()
    assert row().endswith("  starting (was at step 35/400)")
    write_json(file, {**status, "step": 36, "updated": "1970-01-01T00:16:42+00:00"})
    assert "step 36/400" in row() and "was at" not in row()


def test_lines_that_a_full_disk_has_cut_are_passed_over(views_of):
    attempt(views_of.path, "stage1", "1 start 1 0 0-0 2 n1", "2 end 1", "3x end 1 0 0-0 1 x", "4 end 1 y 0-0 1 x")
    views = views_of(SlurmJob("1", "failed", "TIMEOUT"), SlurmJob("2", "cancelled"), SlurmJob("3", "cancelled"))
    assert views[0].note == "TIMEOUT"


def test_time_limit_in_set_up_is_named(views_of):
    attempt(views_of.path, "stage1", "1 start 1 0 0-0 2 n1", "2 limit 1 0 0-0 75 the time limit came in set-up")
    others = (SlurmJob("2", "pending"), SlurmJob("3", "pending"))
    assert views_of(SlurmJob("1", "failed", "TIMEOUT"), *others)[0].note == "the time limit came in set-up"
    waiting = views_of(SlurmJob("1", "pending", "PENDING", "BeginTime"), *others)
    assert waiting[0].note == "waits to go on after: the time limit came in set-up (BeginTime)"
