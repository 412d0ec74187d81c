"""Submitting all jobs or none, whatever happens in between. Slurm's commands are scripts; NeMo-Run is the real one."""

import os
import signal
import time

import pytest

from jet_launcher.cli import main
from jet_launcher.cluster_launch import cluster_of
from jet_launcher.run_directory import RunDirectory
from jet_launcher.slurm.launch import Target
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.lock import exclusive


def test_refused_third_job_takes_the_others_back_and_resume_goes_to_the_cluster_again(place):
    place.slurm.steer(refused=3)
    code, out, err = place.call(*place.arguments())
    assert (code, out) == (1, "")
    assert err == "error: submission failed: sbatch: error: Invalid qos specification; 2 jobs were taken back\n"
    assert place.slurm.states() == {"11": "CANCELLED", "12": "CANCELLED"}
    assert place.slurm.said("cancelled").split() == ["12", "11"], "dependents first"
    assert [row["job_id"] for row in place.record["submissions"][0]["jobs"]] == ["11", "12"]
    place.slurm.relent("refused")
    code, out, err = place.call("resume", "a")
    assert (code, err) == (0, "")
    assert "3 jobs submitted" in out
    assert not (place.run / "stages" / "prepare" / "status.json").exists(), "nothing ran here"


def test_run_that_never_got_to_the_cluster_still_belongs_there(place, capsys):
    place.slurm.steer(refused=1)
    assert "Invalid qos specification; nothing was submitted" in place.call(*place.arguments())[2]
    assert place.record["submissions"] == [] and place.record["name"] == str(place.cluster)
    assert isinstance(cluster_of(RunDirectory(place.run), None), Target), "`resume` goes there, not to this machine"
    assert main(["status", "a"]) == 0
    assert "submit with: python launcher/postnas.py resume" in capsys.readouterr().out.splitlines()[-1]
    assert main(["cancel", "a"]) == 0
    assert capsys.readouterr().out == "a is not running\n"
    assert main(["logs", "a"]) == 1
    assert main(["list"]) == 0
    assert "pending" in capsys.readouterr().out


def test_job_that_slurm_took_without_saying_so_is_found_and_one_that_stays_is_named(place):
    place.slurm.steer(lost=2, denied="11")
    code, _, err = place.call(*place.arguments())
    assert code == 1 and "sbatch: error: Socket timed out; jobs 11, 12 may still be in the queue" in err
    assert "(scancel: error: Kill job error on job id 11: Access/permission denied): scancel 11 12" in err
    assert place.slurm.states() == {"11": "PENDING", "12": "CANCELLED"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_submission_leaves_nothing_behind(place, number):
    """The whole process group gets the signal, as from a terminal, while Slurm has taken a job and not answered yet."""
    place.slurm.steer(slow=2)
    process = place.start(*place.arguments())
    while not (place.slurm.folder / "here").exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert [row["job_id"] for row in place.record["submissions"][0]["jobs"]] == ["11"], "known as soon as it is taken"
    os.killpg(process.pid, number)
    place.slurm.steer(go="")
    _, err = process.communicate(timeout=250)
    assert process.returncode == 75
    assert err.splitlines()[-1] == "error: submission failed: interrupted; 2 jobs were taken back"
    assert place.slurm.states() == {"11": "CANCELLED", "12": "CANCELLED"}, "no third one"
    assert [row["job_id"] for row in place.record["submissions"][0]["jobs"]] == ["11", "12"]


def test_second_resume_does_not_even_look_into_the_queue(place, capsys):
    """Both would find the same jobs missing."""
    assert place.plain() == 0
    place.slurm.steer(silent="")
    for command in (["resume", "a"], ["resume", "a", "--cluster", "local"]):
        with exclusive(place.run / ".lock"):
            assert main(command) == 1
        assert f"process {os.getpid()} on" in capsys.readouterr().err


def test_job_that_can_never_start_is_told(place, capsys):
    place.slurm.steer(reason="PartitionConfig")
    assert place.plain() == 0
    warning = (
        "warning: stage1 (job 11) waits for PartitionConfig: asks for more than the partition allows (time_limit, "
    )
    assert capsys.readouterr().err.startswith(warning)
    place.slurm.add("11", "PENDING", "AssocGrpCpuLimit")
    main(["status", "a"])
    assert "AssocGrpCpuLimit: a limit of your account or QOS" in capsys.readouterr().out
    place.slurm.steer(reason="Priority")
    assert place.plain("stage2") == 0
    assert capsys.readouterr().err == ""


def test_cluster_file_that_is_broken_is_not_replaced_by_the_runs_copy(place, capsys):
    """Only one that is gone is."""
    assert place.plain() == 0
    place.cluster.write_text("nodes: 4\nhurry: yes\n")
    with pytest.raises(UserError, match="hurry"):
        cluster_of(RunDirectory(place.run), None)
    place.cluster.unlink()
    assert cluster_of(RunDirectory(place.run), None).cluster.nodes == 4
    assert "a: goes on with its copy of the cluster file" in capsys.readouterr().err


def test_lock_that_cannot_be_taken_is_one_line(place, capsys):
    """Somebody else's run directory. A directory in the lock's place stands for it: root may write everywhere."""
    assert place.plain() == 0
    (place.run / ".lock").unlink()
    (place.run / ".lock").mkdir()
    with pytest.raises(UserError, match="cannot be written"), exclusive(place.run / ".lock"):
        pass
    assert main(["resume", "a"]) == 1
    assert capsys.readouterr().err == "error: runs/a: cannot be written (Is a directory)\n"
    assert place.plain() == 1
    assert "cannot be written (Is a directory)" in capsys.readouterr().err


def test_error_about_a_name_with_a_line_break_is_one_line(place, capsys):
    assert main([*place.arguments(), "--output", "runs/a\nb"]) != 0
    assert capsys.readouterr().err.count("\n") == 1


def test_recipe_of_any_name_has_a_directory(place):
    assert place.plain() == 0
    config = (place.run / "config.yaml").read_text()
    (place.folder / "odd.yaml").write_text(config.replace("recipe: tiny_distill", "recipe: 'o d/d'"))
    code, out, err = place.call("run", "odd.yaml", "--cluster", str(place.cluster), "--dryrun")
    assert (code, err) == (0, "")
    assert "from runs/o-d-d-TIME" in out
