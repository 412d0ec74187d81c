"""Runs on a real Slurm beyond the scheduler: hostile values, NeMo-Run's commands, the plain twin, own host names."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_jet.configs.files import read_json
from slurm.cluster import Cluster, namespaces_work
from slurm.runs import ROOT, expected, slurm_command

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
HOSTILE = {
    "HOSTILE_QUOTE": 'it\'s "this"',
    "HOSTILE_COMMAND": "$(touch pwned) `touch pwned` ${HOME} $HOME",
    "HOSTILE_END": "x; touch pwned; #",
    "HOSTILE_NEMO": "/a/nemo_run/b",
    "HOSTILE_SPACES": "  a  b\\n ",
}


def test_hostile_values_do_nothing_and_arrive(submit, tmp_path):
    written = {key: value.replace("${", "$${") for key, value in HOSTILE.items()}
    comment = 'a\'b "c" $(touch pwned) `d` ;#'
    run = submit("report", env=written, sbatch={"comment": comment, "mail-user": "x;touch pwned"})
    job = run.views()["report"].job_id
    shown = slurm_command("scontrol", "show", "job", "--oneliner", job)
    assert f" Comment={comment}" in shown
    assert run.until_over()["report"].state == "done"
    assert run.stage_result("report")["environment"] == HOSTILE
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_refused_submission_leaves_nothing_in_the_queue(submit):
    run = submit("stage1,report", partition="nowhere", wait=True, name="refused")
    assert run.submitted.returncode == 1
    assert "error: submission failed" in run.submitted.stderr
    assert "partition" in run.submitted.stderr and "; nothing was submitted" in run.submitted.stderr
    assert read_json(run.path / "cluster" / "experiment.json")["submissions"] == []
    assert "refused." not in slurm_command("squeue", "-h", "-o", "%j")


def test_refused_third_job_leaves_nothing_in_the_queue_either(submit, tmp_path, monkeypatch):
    """The third sbatch asks for a partition that there is not."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    third = f'[ "$(wc -l < {tmp_path}/calls)" = 3 ] && set -- --partition=nowhere "$@"'
    sbatch.write_text(f'#!/bin/bash\necho >> {tmp_path}/calls\n{third}\nexec {shutil.which("sbatch")} "$@"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    run = submit("stage1,stage2", {"prepare": "long"}, wait=True, name="third")
    assert run.submitted.returncode == 1
    assert "invalid partition" in run.submitted.stderr and "; 2 jobs were taken back" in run.submitted.stderr
    views = run.views()
    assert {name: view.state for name, view in views.items()} == {"prepare": "cancelled", "stage1": "cancelled"}
    left = slurm_command("squeue", "-h", "-o", "%j %T").splitlines()
    assert [line for line in left if line.startswith("third.") and not line.endswith("COMPLETING")] == []
    assert not (run.path / "stages" / "prepare" / "result.json").exists()


def test_stopped_controller_makes_nobody_lie(submitter, monkeypatch, slurm):
    """Its jobs go on, so whoever would end, delete or repeat something has to wait."""
    own = Cluster(Path("/tmp") / f"stopped-{os.getpid()}", nodes=2, accounting=False, message_timeout=2)
    monkeypatch.setenv("SLURM_CONF", "")
    own.start()
    try:
        run = submitter.stand_in("stage1", {"stage1": "hold"}, exclude=None)
        run.until_step("stage1", 3)
        waiting = run.start("resume", str(run.path), "--wait")
        assert "1 jobs are in the queue" in waiting.stdout.readline()
        [controller] = [
            line.split()[1] for line in (own.prefix / "pids").read_text().splitlines() if "slurmctld" in line
        ]
        os.kill(int(controller), signal.SIGSTOP)
        try:
            for command in (["cancel"], ["clean", "--all"], ["resume"]):
                refused = run.launcher(command[0], str(run.path), *command[1:], check=False)
                assert refused.returncode == 1 and refused.stdout == "", command
                assert refused.stderr.startswith("error: Slurm does not answer (slurm_load_jobs error:")
            assert "Slurm does not answer" in run.launcher("status", str(run.path)).stdout
            while "still waiting" not in (line := waiting.stdout.readline()):
                assert line, "no longer waiting"
        finally:
            os.kill(int(controller), signal.SIGCONT)
        assert run.views()["stage1"].state == "running"
        assert "1 jobs cancelled" in run.launcher("cancel", str(run.path)).stdout
        assert "error: stage1 cancelled" in waiting.communicate(timeout=600)[1]
        assert waiting.returncode == 1
        submitter.close()  # while its own Slurm answers
    finally:
        submitter.runs.clear()
        own.stop()
        shutil.rmtree(own.prefix)


def test_waiting_says_done_and_nemo_runs_own_commands_work(submit):
    run = submit("report", wait=True, name="waited")
    assert run.submitted.returncode == 0, run.submitted.stderr
    assert "waited: done" in run.submitted.stdout
    experiment = read_json(run.path / "cluster" / "experiment.json")["submissions"][0]["experiment"]
    nemo = [str(Path(sys.executable).parent / "nemo"), "experiment"]

    def ask(*arguments: str) -> str:
        done = subprocess.run([*nemo, *arguments], env=run.environment, capture_output=True, text=True, timeout=300)
        return done.stdout + done.stderr

    status = ask("status", experiment)
    assert "Task 0: report" in status and "Status: SUCCEEDED" in status, status
    assert "report rank 0/1 starts at step 0" in ask("logs", experiment, "0")


def test_second_submission_waits_for_jobs_of_the_first(submit):
    run = submit("placement,block_selection", {"block_selection:gla": "hold", "block_selection:jet": "usage"})
    run.until(lambda v: v["block_selection-jet"].state == "failed", "jet did not fail")
    slow = run.until_step("block_selection-gla")
    again = run.launcher("resume", str(run.path))
    assert "2 jobs submitted" in again.stdout, "jet and the ranking; gla still runs, gated_delta_net is done"
    ranking = run.views()["block_selection"].job_id
    assert f"afterok:{slow.job_id}" in slurm_command("scontrol", "show", "job", "--oneliner", ranking)
    assert "nothing" not in again.stdout
    refused = run.launcher("resume", str(run.path), "--cluster", "local", check=False)
    assert refused.returncode == 1 and "jobs are in the queue or running" in refused.stderr


def test_plain_script_does_a_stage_and_comes_back_after_an_interruption(slurm, submit, tmp_path):
    run = submit("prepare")
    run.until_over()
    environment = {**run.environment, "POSTNAS_LAUNCHER_PYTHON": sys.executable}
    cluster = yaml.safe_load((tmp_path / "run.yaml").read_text())
    cluster["env"] |= {"STAND_IN": "stage1=long", "STAND_IN_STEP_SECONDS": "0.05"}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(cluster))
    command = [ROOT / "slurm" / "postnas.sbatch", tmp_path / "plain.yaml", run.path, "stage1"]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    result = run.path / "stages" / "stage1" / "result.json"
    checkpoints = run.path / "stages" / "stage1" / "checkpoints"
    wait(lambda: len(list(checkpoints.glob("step-*"))) > 2)
    slurm_command("scancel", "--signal=USR1", job)
    wait(lambda: result.exists() and run.events("stage1")[-1] != "start")
    assert run.result("stage1") == expected(400)
    assert run.events("stage1") == ["start", "end 75", "start", "end 0"]
    bad = subprocess.run([*command[:3], "stage9"], env=environment, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "error: unknown stage 'stage9'" in bad.stderr


def wait(there, seconds: float = 240.0) -> None:
    """Until `there()`."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.3)


def test_nodes_with_their_own_addresses_meet(submitter, monkeypatch, slurm):
    """Preflight with a real all-reduce over two nodes that have host names and addresses of their own."""
    if not namespaces_work():
        pytest.skip("this machine does not let us make network namespaces")
    own = Cluster(Path("/tmp") / f"netns-{os.getpid()}", nodes=2, netns=True, accounting=False)
    monkeypatch.setenv("SLURM_CONF", "")
    own.start()
    try:
        preflight = {"free_disk_gib": 0.01, "min_bandwidth_gb_per_s": 1e-6, "timeout_seconds": 400}
        overrides = ("stage1.resources.nodes=2", "nproc=2", "stage1.training.micro_batch_size=2")
        run = submitter.stand_in("stage1", {}, overrides, preflight=preflight, exclude=None)
        views = run.until_over(patience=600)
        assert views["stage1"].state == "done", views
        log = run.launcher("logs", str(run.path), "stage1").stdout
        assert "rendezvous 10.77.0.1:" in log
        assert "on n1" in log and "on n2" in log
        [said] = (run.path / "cluster" / "preflight").glob(f"{views['stage1'].job_id}.0/log.txt")
        assert "n1 (n1): Python 3." in said.read_text() and "n2 (n2): Python 3." in said.read_text()
        assert "all-reduce over 4 processes" in said.read_text()
        submitter.close()  # while its own Slurm answers
    finally:
        submitter.runs.clear()
        own.stop()
        shutil.rmtree(own.prefix)
