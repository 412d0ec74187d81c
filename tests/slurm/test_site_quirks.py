"""What sites and users have on their login nodes, and moments that Slurm chooses badly: on a real Slurm."""

import os
import shutil

import pytest

from slurm.runs import expected, slurm_command

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
# Stays in preflight until the run directory has a file `fit`.
WAIT = 'until [ -e "$POSTNAS_RUN_DIR/fit" ]; do sleep 0.2; done'


def preflight(command: str = WAIT) -> dict:
    return {"free_disk_gib": 0.01, "min_bandwidth_gb_per_s": 0, "timeout_seconds": 900, "command": command}


def test_filters_of_a_user_hide_no_job(submit, monkeypatch):
    for name, value in {"SQUEUE_STATES": "PD", "SQUEUE_PARTITION": "urgent", "SACCT_FEDERATION": "1"}.items():
        monkeypatch.setenv(name, value)
    run = submit("stage1", {"stage1": "hold"})
    job = run.until_step("stage1", 3)
    again = run.launcher("resume", str(run.path))
    assert "nothing to submit" in again.stdout and "1 jobs are in the queue" in again.stdout
    monkeypatch.delenv("SQUEUE_STATES")
    monkeypatch.delenv("SQUEUE_PARTITION")
    slurm_command("scancel", "--signal=USR1", job.job_id)
    run.until(lambda v: v["stage1"].restarts == 1, "the job did not find itself running")
    run.let_go()
    assert run.until_over()["stage1"].state == "done"
    assert run.events("stage1") == ["start", "end 75", "start", "end 0"]


def test_sbatch_that_greets(submit, tmp_path, monkeypatch):
    greeting = "*** Site news: 3 jobs, 2026 ***"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    text = f'echo "{greeting}"; {shutil.which("sbatch")} "$@"; code=$?; echo "--> quota: 12 of 50"; exit $code'
    sbatch.write_text(f"#!/bin/bash\n{text}\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    run = submit("stage1,stage2", {"stage1": "hold"})
    views = run.views()
    assert all(view.job_id.isdecimal() for view in views.values())
    run.until_step("stage1", 3)
    assert "2 jobs cancelled" in run.launcher("cancel", str(run.path)).stdout
    assert {view.state for view in run.views().values()} == {"done", "cancelled"}
    run.let_go()
    assert "2 jobs submitted" in run.launcher("resume", str(run.path), "--wait").stdout
    assert run.result("stage2") == expected(12)


def test_sbatch_that_says_no_job_id_leaves_no_job(submit, tmp_path, monkeypatch):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/bash\n{shutil.which("sbatch")} "$@" > /dev/null && echo "thank you"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    run = submit("stage1", wait=True, name="thanked")
    assert run.submitted.returncode == 1
    assert "sbatch printed no job ID that can be told from the rest (thank you); 1 jobs were" in run.submitted.stderr
    left = slurm_command("squeue", "-h", "-o", "%j %T").splitlines()
    assert [line for line in left if line.startswith("thanked.") and not line.endswith("COMPLETING")] == []


def test_preemption_in_preflight_blames_no_node(submit):
    run = submit("report", sbatch={"nodelist": "n8"}, exclude="n7", cpus_per_task=8, preflight=preflight())
    job = run.until(lambda v: (run.path / "cluster" / "preflight").exists(), "no preflight")["report"]
    run.until(lambda v: v["report"].state == "running", "no preflight")
    for attempt in (1, 2):
        folder = run.path / "cluster" / "preflight" / f"{job.job_id}.{attempt - 1}"
        run.until(lambda v, folder=folder: folder.exists() and v["report"].state == "running", "no preflight")
        urgent = ["sbatch", "--parsable", "-p", "urgent", "-w", "n8", "-c", "8", "-o", "/dev/null", "--wrap", "sleep 1"]
        slurm_command(*urgent)
        run.until(
            lambda v, n=attempt: v["report"].restarts >= n or v["report"].state == "pending", "job was not preempted"
        )
    (run.path / "fit").touch()
    assert run.until_over()["report"].state == "done"
    assert "preflight" not in run.events("report") and "failed" not in run.events("report")
    assert " ExcNodeList=n7 " in slurm_command("scontrol", "show", "job", "--oneliner", job.job_id)


def test_held_job_says_how_to_let_it_go(submit):
    run = submit("report", preflight=preflight())
    job = run.until(lambda v: (run.path / "cluster" / "preflight").exists(), "no preflight")["report"]
    slurm_command("scontrol", "requeuehold", job.job_id)
    run.until(lambda v: v["report"].state == "pending" and "scontrol release" in v["report"].note, "not held")
    (run.path / "fit").touch()
    shown = run.launcher("status", str(run.path)).stdout
    assert f"`scontrol release {job.job_id}`" in shown and "expected" not in shown
    slurm_command("scontrol", "release", job.job_id)
    assert run.until_over()["report"].state == "done"
