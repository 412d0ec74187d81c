"""Texts of a job: hostile values arrive as they are and run nothing; NeMo-Run gets what the cluster file says."""

import subprocess
from pathlib import Path

import pytest

from jet_launcher.slurm.experiment import check_paths
from jet_launcher.slurm.graph import Job
from jet_launcher.slurm.scripts import (
    JobPlace,
    check_mounts,
    default_python,
    sbatch_options,
    setup_lines,
    srun_options,
    step_script,
    write_scripts,
)
from megatron_jet.configs.cluster import ClusterConfig
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.training import ParallelConfig

JOB = Job("stage1", "stage1", "stage1", 2, 4, 4, ParallelConfig(), ())
HOSTILE = {
    "QUOTE": "it's",
    "DOUBLE": 'say "hi"',
    "COMMAND": "$(touch pwned) `touch pwned` ${HOME}",
    "END": "x; touch pwned; #",
    "SLASH": "back\\slash \\n",
    "SPACE": "  two  spaces  ",
    "STAR": "* ~ ? [a] {b,c} !x",
    "UNICODE": "naïve – ü",
    "NEMO": "/data/nemo_run/x and /nemo_run",
    "EMPTY": "",
    "DASH": "-n --rf",
}


def place(tmp_path) -> JobPlace:
    return JobPlace(tmp_path / "run", tmp_path / "code", tmp_path, "python3")


def environment_after(script: str, tmp_path, cluster: ClusterConfig) -> dict[str, str]:
    """Variables that a script exports, with the shipped shell files replaced by one that prints them."""
    write_scripts([JOB], cluster, place(tmp_path))
    shell = tmp_path / "code" / "slurm"
    shell.mkdir(parents=True, exist_ok=True)
    (shell / "job.sh").write_text(
        'postnas_enter() { :; }; postnas_begin() { env -0; }; postnas_load_module() { export LOADED="$LOADED<$1>"; }\n'
    )
    (shell / "step.sh").write_text("env -0\n")
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path, check=True)
    return dict(item.split("=", 1) for item in done.stdout.decode().split("\0") if "=" in item)


@pytest.mark.parametrize("text", [setup_lines, step_script])
def test_hostile_values_reach_the_process_unchanged(tmp_path, text):
    cluster = ClusterConfig(env=HOSTILE, preflight={"command": "echo 'a b' \"$X\"; false"})
    seen = environment_after(text(JOB, cluster, place(tmp_path)), tmp_path, cluster)
    assert {key: seen[key] for key in HOSTILE} == HOSTILE
    assert seen["POSTNAS_PREFLIGHT_COMMAND"] == "echo 'a b' \"$X\"; false"
    assert not (tmp_path / "pwned").exists()


def test_nemo_runs_replacement_does_not_touch_values(tmp_path):
    cluster = ClusterConfig(env=HOSTILE)
    replaced = setup_lines(JOB, cluster, place(tmp_path)).replace("/nemo_run", "/somewhere/else")
    assert environment_after(replaced, tmp_path, cluster)["NEMO"] == HOSTILE["NEMO"]


def test_values_of_the_environment_are_for_their_owner_alone(tmp_path):
    cluster = ClusterConfig(env={"TOKEN": "hf_secret", "OTHER": "x"})
    where = place(tmp_path)
    write_scripts([JOB], cluster, where)
    holding = [path for path in where.cluster_dir.rglob("*") if path.is_file() and "hf_secret" in path.read_text()]
    assert [path.stat().st_mode & 0o777 for path in holding] == [0o600]
    assert "hf_secret" not in setup_lines(JOB, cluster, where), "NeMo-Run keeps these lines in files of its own"
    assert "TOKEN OTHER" in setup_lines(JOB, cluster, where)
    assert environment_after(step_script(JOB, cluster, where), tmp_path, cluster)["TOKEN"] == "hf_secret"


def test_jobs_of_an_earlier_submission_keep_their_environment(tmp_path):
    first, second = ClusterConfig(env={"A": "1"}), ClusterConfig(env={"A": "2"})
    script = setup_lines(JOB, first, place(tmp_path))
    write_scripts([JOB], first, place(tmp_path))
    assert environment_after(script, tmp_path, second)["A"] == "1"


@pytest.mark.parametrize("text", [setup_lines, step_script])
def test_job_without_its_environment_does_not_start(tmp_path, text):
    script = text(JOB, ClusterConfig(env={"A": "1"}), place(tmp_path))
    assert subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path).returncode == 1


def test_env_may_change_what_the_launcher_would_set(tmp_path):
    cluster = ClusterConfig(env={"HF_HUB_OFFLINE": "0"})
    seen = environment_after(step_script(JOB, cluster, place(tmp_path)), tmp_path, cluster)
    assert (seen["HF_HUB_OFFLINE"], seen["HF_DATASETS_OFFLINE"]) == ("0", "1")


def test_nemo_runs_replacement_does_not_touch_setup_lines(tmp_path):
    lines = ("if true; then", "  export SEEN='it''s '/nemo_run/x\"$(echo /nemo_run)\"", "fi", "export LAST=$SEEN")
    cluster = ClusterConfig(setup=lines)
    replaced = setup_lines(JOB, cluster, place(tmp_path)).replace("/nemo_run", "/somewhere/else")
    seen = environment_after(replaced, tmp_path, cluster)
    assert seen["LAST"] == "its /nemo_run/x/nemo_run"
    assert environment_after(step_script(JOB, cluster, place(tmp_path)), tmp_path, cluster)["LAST"] == seen["LAST"]


def test_modules_are_quoted_and_come_before_the_setup_lines(tmp_path):
    cluster = ClusterConfig(modules=("cuda/13", "a b; touch pwned"), setup=('export SEEN="$LOADED"',))
    seen = environment_after(setup_lines(JOB, cluster, place(tmp_path)), tmp_path, cluster)
    assert seen["SEEN"] == "<cuda/13><a b; touch pwned>"
    assert not (tmp_path / "pwned").exists()


def test_sbatch_options():
    cluster = ClusterConfig(
        account="a",
        qos="q",
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=3,
        mem="0",
        exclusive=True,
        sbatch={"comment": "x y"},
    )
    options = sbatch_options(JOB, cluster)
    assert options["signal"] == "USR1@300", "to the processes, not to the batch script"
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == (2, 4, 4)
    assert (options["comment"], options["kill-on-invalid-dep"], options["exclusive"]) == ("x y", "yes", True)
    assert "partition" not in options
    assert "gres" in sbatch_options(JOB, cluster.replace(gpu_request="gres"))
    assert not {"gres", "gpus-per-node"} & set(sbatch_options(JOB, cluster.replace(gpu_request="none")))


def test_type_of_the_gpus():
    cluster = ClusterConfig(gpus_per_node=4, gpu_type="a100", account="team/project", clusters="east")
    options = sbatch_options(JOB, cluster)
    assert (options["gpus-per-node"], options["account"], options["clusters"]) == ("a100:4", "team/project", "east")
    assert sbatch_options(JOB, cluster.replace(gpu_request="gres"))["gres"] == "gpu:a100:4"
    one = Job("export", "export", "export", 1, 1, 1, ParallelConfig(), ())
    assert sbatch_options(one, cluster.replace(gpu_request="gres"))["gres"] == "gpu:a100:1", "what one node gives it"
    assert not {"gres", "gpus-per-node"} & set(sbatch_options(JOB, cluster.replace(gpu_request="none")))


def test_early_warning_is_ignored_before_anything_else_happens(tmp_path):
    """Set-up lines of a process may take their time."""
    cluster = ClusterConfig(setup=("kill -USR1 $$",), env={"A": "1"})
    assert environment_after(step_script(JOB, cluster, place(tmp_path)), tmp_path, cluster)["A"] == "1"


MOUNTED = ClusterConfig(container={"image": "a", "mounts": ["/lustre:/lustre", "/other:/elsewhere:ro"]})
UNSEEN = {
    "teacher": (
        "teacher.path=/shared/t",
        "teacher.path=/shared/t: this is under no mount of the container; add /shared:",
    ),
    "tokenizer": ("teacher.tokenizer=/shared/t", "teacher.tokenizer=/shared/t: this is under no"),
    "data": (
        "data.path=/home/me/data",
        "data.path=/home/me/data: this is under no mount of the container; add /home/me",
    ),
    "similar_name": ("data.path=/lustre2/data", "data.path=/lustre2/data: this is under no mount"),
    "other_target": ("data.path=/other/data", "data.path=/other/data: this is under no mount"),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_input_that_the_container_does_not_see_is_refused(case):
    override, said = UNSEEN[case]
    config = apply_overrides(load_recipe("tiny"), [override])
    with pytest.raises(UserError) as error:
        check_mounts(config, MOUNTED)
    assert str(error.value).startswith(said)
    check_mounts(config, ClusterConfig())
    check_mounts(apply_overrides(load_recipe("tiny"), ["teacher.path=/lustre/t", "data.path=/lustre/a/b"]), MOUNTED)


def test_link_that_leads_out_of_the_mounts_is_refused(tmp_path):
    (tmp_path / "far" / "data").mkdir(parents=True)
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "data").symlink_to(tmp_path / "far" / "data")
    config = apply_overrides(load_recipe("tiny"), [f"data.path={tmp_path}/near/data"])
    mount = f"{tmp_path}/near:{tmp_path}/near"
    with pytest.raises(UserError, match=rf"leads to {tmp_path}/far/data, which is under no mount"):
        check_mounts(config, ClusterConfig(container={"image": "a", "mounts": [mount]}))
    both = [mount, f"{tmp_path}/far:{tmp_path}/far"]
    check_mounts(config, ClusterConfig(container={"image": "a", "mounts": both}))


def test_no_pmix_and_time_to_save_for_the_others():
    assert "--mpi=none" in srun_options()
    assert "--kill-on-bad-exit=0" in srun_options()


def test_python_of_the_jobs():
    assert default_python(ClusterConfig(venv="/v"), "/own/python") == "/v/bin/python"
    assert default_python(ClusterConfig(container={"image": "i"}), "/own/python") == "python"
    assert default_python(ClusterConfig(), "/own/python") == "/own/python"


@pytest.mark.parametrize("path", ["/a b", "/a,b", "/a:b"])
@pytest.mark.parametrize("what", ["run directory", "working directory"])
def test_paths_that_a_container_cannot_mount_are_refused(path, what):
    paths = {"run directory": Path("/r"), "working directory": Path("/w"), what: Path(path)}
    where = JobPlace(paths["run directory"], Path("/c"), paths["working directory"], "python3")
    with pytest.raises(UserError, match=f"{what} {path}: a container can mount"):
        setup_lines(JOB, ClusterConfig(container={"image": "a"}), where)
    setup_lines(JOB, ClusterConfig(), where)


@pytest.mark.parametrize("path", ["/a b/run", "/a;b", "/a'b", "/x/nemo_run/y", "/a\nb"])
def test_paths_that_nemo_run_would_break_are_refused(path):
    with pytest.raises(UserError, match="run directory"):
        check_paths(JobPlace(Path(path), Path("/c"), Path("/"), "python3"))
