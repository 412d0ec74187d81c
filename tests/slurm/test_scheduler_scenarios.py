"""Jobs on a real Slurm: interruptions, crashes, bad nodes. The stand-in's result shows steps done twice or lost."""

import re
import subprocess

import pytest

from slurm.runs import expected, slurm_command

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
# prepare comes along with every stage; the stand-in is quick.
TWO_NODES = ("stage1.resources.nodes=2", "nproc=2", "stage1.training.micro_batch_size=2")
LONG = 400


def test_early_warning_saves_requeues_and_resumes_until_done(submit):
    run = submit("stage1", {"stage1": "hold"}, TWO_NODES, time_limit="00:01:40", early_warning_seconds=60)
    run.until(lambda v: v["stage1"].restarts > 0, "no early warning")
    run.let_go()
    views = run.until_over()
    assert views["stage1"].state == "done"
    assert run.result("stage1") == expected(12)
    assert "end 75" in run.events("stage1")
    assert run.events("stage1")[-1] == "end 0"


def test_job_that_misses_the_warning_is_queued_again_before_the_time_limit_ends_it(submit):
    run = submit("stage1", {"stage1": "deaf"}, time_limit="00:01:00", early_warning_seconds=30)
    run.until(lambda v: v["stage1"].restarts > 0, "not queued again")
    run.let_go()
    views = run.until_over()
    assert views["stage1"].state == "done"
    assert run.result("stage1") == expected(12)
    assert "the time limit came in the stage" in run.attempts("stage1")
    assert "TIMEOUT" not in slurm_command("sacct", "-nXPD", "-j", views["stage1"].job_id, "-o", "State")


def test_requeue_by_an_administrator_resumes_and_logs_follow(submit):
    run = submit("stage1", {"stage1": "long"}, TWO_NODES, env={"STAND_IN_STEP_SECONDS": "0.05"})
    job = run.until_step("stage1", 8)
    follower = run.start("logs", str(run.path), "stage1", "-f")
    slurm_command("scontrol", "requeue", job.job_id)
    views = run.until_over()
    out, err = follower.communicate(timeout=600)
    starts = {
        line.rpartition("starts at step ")[2].split()[0] for line in out.splitlines() if "rank 0/4 starts" in line
    }
    assert "0" in starts and len(starts) == 2, "both attempts are shown"
    assert (follower.returncode, err) == (0, "stage1: done\n")
    assert views["stage1"].state == "done"
    assert views["stage1"].restarts == 1
    assert run.result("stage1") == expected(LONG)


def test_preempted_job_saves_within_its_grace_time_and_resumes(submit):
    run = submit("stage1", {"stage1": "long"}, sbatch={"nodelist": "n8"}, exclude="n7", cpus_per_task=8,
                 env={"STAND_IN_STEP_SECONDS": "0.05"})  # fmt: skip
    job = run.until_step("stage1", 3)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-w", "n8", "-c", "8", "-o", "/dev/null", "--wrap", "sleep 3"]
    slurm_command(*urgent)
    run.until(lambda v: v["stage1"].restarts == 1 or v["stage1"].state == "pending", "job was not preempted")
    assert run.until_over()["stage1"].state == "done"
    assert run.result("stage1") == expected(LONG)
    assert "end 75" in run.events("stage1"), job


def test_node_failure_moves_the_job_to_another_node(submit):
    run = submit("stage1", {"stage1": "long"}, sbatch={"nodelist": "n7"}, exclude="n8",
                 env={"STAND_IN_STEP_SECONDS": "0.05"})  # fmt: skip
    job = run.until_step("stage1", 3)
    slurm_command("scontrol", "update", "NodeName=n7", "State=DOWN", "Reason=test")
    try:
        run.until(lambda v: v["stage1"].state == "pending", "job was not queued again")
        slurm_command("scontrol", "update", f"JobId={job.job_id}", "ReqNodeList=")
        views = run.until_over()
    finally:
        # It may have come back by itself meanwhile.
        subprocess.run(["scontrol", "update", "NodeName=n7", "State=RESUME"], capture_output=True)
    assert views["stage1"].state == "done"
    assert run.result("stage1") == expected(LONG)


def test_cancelling_one_stage_cancels_its_dependents_and_resume_does_the_rest(submit):
    run = submit("stage1,stage2", {"stage1": "long"}, env={"STAND_IN_STEP_SECONDS": "0.05"})
    job = run.until_step("stage1", 8)
    slurm_command("scancel", job.job_id)
    views = run.until_over()
    assert [views[name].state for name in ("prepare", "stage1", "stage2")] == ["done", "cancelled", "cancelled"]
    assert views["stage2"].note == "not started: stage1 cancelled"
    assert not (run.path / "stages" / "stage2").exists()
    done = run.launcher("resume", str(run.path), "--wait")
    assert "2 jobs submitted" in done.stdout
    assert run.result("stage1") == expected(LONG)
    assert run.result("stage2") == expected(12)
    assert "starts at step 0" not in run.launcher("logs", str(run.path), "stage1").stdout


def test_stage_that_always_crashes_gives_up_and_says_why(submit):
    run = submit("stage1,stage2", {"stage1": "crash@7"}, wait=True)
    assert run.submitted.returncode == 1
    assert (
        "error: stage1 failed (crashed with exit code 1, 2 times without progress: RuntimeError" in run.submitted.stderr
    )
    views = run.views()
    assert [views[name].state for name in ("stage1", "stage2")] == ["failed", "cancelled"]
    # The first crash comes after a checkpoint, which is progress; only the next ones count.
    assert run.events("stage1") == ["start", "end 1", "start", "end 1", "start", "end 1", "failed"]
    assert "crashed with exit code 1" in views["stage2"].note


def test_crash_and_usage_error(submit):
    run = submit("placement,block_selection", {"block_selection:gla": "crash_once@3", "block_selection:jet": "usage"})
    views = run.until_over()
    assert views["block_selection-gla"].state == "done"
    assert run.events("block_selection-gla") == ["start", "end 1", "start", "end 0"]
    assert run.result("block_selection:gla") == expected(12)
    assert views["block_selection-jet"].state == "failed"
    assert run.events("block_selection-jet") == ["start", "end 2", "failed"], "a usage error is not tried again"
    assert views["block_selection-gated_delta_net"].state == "done", "other candidates go on"
    assert views["block_selection"].note.startswith("not started: block_selection-jet failed (usage error")


def test_killed_process_on_two_nodes_restarts_the_job(submit):
    run = submit("stage1", {"stage1": "kill@7"}, TWO_NODES)
    views = run.until_over()
    assert views["stage1"].state == "done"
    assert run.result("stage1") == expected(12)
    assert run.events("stage1")[0] == "start"
    assert len(run.events("stage1")) == 4
    logs = sorted(path.name.split(".", 3)[2:] for path in (run.path / "stages" / "stage1" / "logs").glob("*.log"))
    assert [name[0] for name in logs] == ["0", "0", "1", "1"], "one log per node and attempt"


def test_bad_node_is_named_excluded_and_the_job_runs_elsewhere(submit, tmp_path):
    """The first node of stage 1 that is asked has a broken fan from then on."""
    bad = tmp_path / "bad"
    check = (
        f'if [ "$POSTNAS_JOB" = stage1 ] && mkdir {bad}.asked 2> /dev/null; then echo "$SLURMD_NODENAME" > {bad}; fi; '
        f'if [ "$(cat {bad} 2> /dev/null)" = "$SLURMD_NODENAME" ]; then echo fan is broken >&2; exit 3; fi'
    )
    preflight = {"free_disk_gib": 0.01, "min_bandwidth_gb_per_s": 0, "timeout_seconds": 120, "command": check}
    run = submit("stage1", {}, TWO_NODES, preflight=preflight, exclude="n[5-8]")
    views = run.until_over()
    node = bad.read_text().strip()
    assert views["stage1"].state == "done"
    assert run.events("stage1") == ["start", "preflight", "start", "end 0"]
    assert f"{node}: site check left with 3: fan is broken" in run.attempts("stage1")
    nodes, excluded = (node_names(slurm_command("scontrol", "show", "job", "--oneliner", views["stage1"].job_id), key)
                       for key in ("NodeList", "ExcNodeList"))  # fmt: skip
    assert excluded == {node, "n5", "n6", "n7", "n8"}
    assert len(nodes) == 2 and node not in nodes


def node_names(shown: str, key: str) -> set[str]:
    """Nodes in a field of `scontrol show job`."""
    value = re.search(rf" {key}=(\S+)", shown).group(1)
    return set(slurm_command("scontrol", "show", "hostnames", value).split())


def test_preflight_gives_up_after_its_limit(submit):
    preflight = {"free_disk_gib": 1e9, "min_bandwidth_gb_per_s": 0, "timeout_seconds": 120, "max_requeues": 1}
    run = submit("report", preflight=preflight)
    views = run.until_over()
    assert views["report"].state == "failed"
    assert "preflight failed 2 times" in views["report"].note
    assert "GiB free" in views["report"].note
    assert not (run.path / "stages" / "report").exists() or not list((run.path / "stages" / "report").glob("*.json"))


def test_job_that_preflight_leaves_no_node_for_fails_instead_of_waiting_for_ever(submit):
    preflight = {
        "free_disk_gib": 0.01,
        "min_bandwidth_gb_per_s": 0,
        "timeout_seconds": 120,
        "command": "echo dusty; false",
    }
    run = submit("report", preflight=preflight, exclude="n[2-8]")
    note = run.until_over()["report"].note
    assert run.events("report") == ["start", "preflight", "failed"]
    assert note == "preflight failed: n1: site check left with 1: dusty; the other nodes are too few for this job"


def test_two_experiments_share_nodes_without_meeting(submit):
    first = submit("stage1", {}, TWO_NODES, name="first", exclude="n[1-4,7-8]")
    second = submit("stage1", {}, TWO_NODES, name="second", exclude="n[1-4,7-8]")
    ports = set()
    for run in (first, second):
        assert run.until_over()["stage1"].state == "done"
        assert run.result("stage1") == expected(12)
        log = run.launcher("logs", str(run.path), "stage1").stdout
        ports |= {line.rpartition(":")[2] for line in log.splitlines() if line.startswith("rendezvous")}
    assert len(ports) == 2
