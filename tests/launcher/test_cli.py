"""What a user meets first: help, bad input, dry runs, a machine without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jet_launcher.cli import app

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launcher" / "postnas.py"
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "transformers", "nemo_run", "triton", "numpy"):
            raise ImportError(f"{name} is not installed on a login node")
sys.meta_path.insert(0, Blocker())
"""


def test_commands_are_those_of_the_documentation():
    assert COMMANDS == ["cancel", "clean", "list", "logs", "report", "resume", "run", "status"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(launcher, command):
    code, out, _ = launcher(command, "--help")
    assert code == 0
    assert f"Example: python launcher/postnas.py {command} " in " ".join(out.split())


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "run", "--help"]
    start = os.times()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    end = os.times()
    # Processor time, which a busy machine does not stretch.
    assert end.children_user + end.children_system - start.children_user - start.children_system < 1.0
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "nemo_run", "numpy", "megatron_jet.configs.run"}


def test_usage_errors_exit_2(launcher):
    assert launcher("fly")[0] == 2
    assert launcher("run")[0] == 2
    assert launcher("run", "tiny", "--no-such-option")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tinny"], "unknown recipe 'tinny'; known: tiny, jet_nemotron_2b"),
        (["run", "nowhere:recipe"], "recipe 'nowhere:recipe': cannot import nowhere"),
        (["run", "json:no_such"], "json has no function 'no_such'"),
        (["run", "missing.yaml"], "missing.yaml: no such file"),
        (["run", "tiny", "placement.bugdet=1"], "unknown key 'placement.bugdet', did you mean 'budget'?"),
        (["run", "tiny", "placement.budget=many"], "placement.budget: Input should be a valid integer"),
        (["run", "tiny", "placement.budget"], "write key.sub=value"),
        (["run", "tiny", "nproc=0"], "nproc: Input should be greater than or equal to 1 (got 0)"),
        (["run", "tiny", "teacher.path=/no/such/model"], "teacher.path=/no/such/model: no such directory"),
        (["run", "tiny", "teacher.path=bundled:huge"], "bundled:huge: no such bundled teacher"),
        (["run", "tiny", "--cluster", "moon"], "cluster 'moon'"),
        (["run", "tiny", "--stages", "stage9"], "unknown stage 'stage9'"),
        (["status", "ghost"], "no run 'ghost' here or in runs/"),
        (["resume", "ghost"], "no run 'ghost'"),
        (["report", "ghost"], "no run 'ghost'"),
        (["logs", "ghost"], "no run 'ghost'"),
        (["cancel", "ghost"], "no run 'ghost'"),
        (["clean", "ghost"], "no run 'ghost'"),
        (["run", "tiny", "--stages", ","], "--stages is empty"),
        (["run", "tiny", "--cluster", "moon.yaml"], "moon.yaml: no such cluster file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(launcher, workplace, arguments, message):
    code, _, err = launcher(*arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ") and message in err
    assert os.listdir(workplace) == []  # nothing half-written


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/no/data", "data.path=/no/data: no index.json there; make it with tools/prepare_data.py"),
        ("placement.swa_window=0", "placement.swa_window: Input should be greater than or equal to 1"),
        ("placement.budget=9", "budget 9 does not fit a model of 8 layers"),
        ("placement.swa_budget=7", "do not fit 8 layers"),
        ("parallel.tensor=3", "attn: 4 heads do not divide by tensor_parallel=3"),
        ("parallel.tensor=2", "placement: 1 processes do not divide by tensor*pipeline=2 (nproc=1, nodes=1)"),
        ("parallel.context=2", "context parallelism is not supported"),
        ("stage1.training.global_batch_size=7", "global_batch_size=7 does not divide"),
        ("stage2.training.seq_length=65536", "stage2.training.seq_length=65536: the teacher has 32768 positions"),
    ],
)
def test_bad_settings_are_found_before_anything_is_written(launcher, workplace, teacher, override, message):
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", override)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and message in err
    assert os.listdir(workplace) == []


def test_sequences_that_do_not_divide_under_sequence_parallel(launcher, workplace, teacher):
    layout = ("nproc=2", "parallel.tensor=2", "parallel.sequence_parallel=true")
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", *layout, "stage2.training.seq_length=255")
    assert code == 2
    assert "stage2: sequence_parallel shares training.seq_length=255 out over parallel.tensor=2 ranks" in err
    assert os.listdir(workplace) == []


def test_heads_that_do_not_divide_by_tensor_parallel(launcher, workplace, teacher):
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", "nproc=8", "parallel.tensor=8")
    assert code == 2
    assert "4 heads do not divide by tensor_parallel=8" in err


def test_data_are_checked_before_anything_is_written(launcher, workplace, teacher, tmp_path):
    """From index.json alone: what the placement is scored on, and what a stage blends."""
    data = tmp_path / "prepared"
    data.mkdir()
    split = {"sources": {"text": 1000, "qa": 500}, "shards": [], "longest": {"qa": 200}}
    index = {"vocab_size": 448, "end_of_text": 1, "seq_length": 256, "tokenizer_hash": "-"}
    index["sources"] = {
        "text": {"packing": "stream", "metric": "loss"},
        "qa": {"packing": "whole", "metric": "exact"},
    }
    index["splits"] = dict.fromkeys(("train", "search", "heldout"), split)
    (data / "index.json").write_text(json.dumps(index))
    arguments = ["run", "tiny", f"teacher.path={teacher}", f"data.path={data}", "data.blend=null"]
    for overrides, message in (
        ([], "placement.objective: 'recall' is not in the search split; known: qa; set placement.objective"),
        (["placement.objective=qa"], "placement.swa_objective: 'choice' is not in the search split; known: qa, text"),
        (
            ["placement.objective=qa", "placement.swa_objective=qa", "stage2.blend={maths: 1}"],
            "stage2.blend: the data have no source 'maths' in split 'train'; they have qa, text",
        ),
        (
            ["placement.objective=qa", "placement.swa_objective=qa", "stage1.training.seq_length=128"],
            "stage1.training.seq_length=128: 'qa' has a sample of 200 tokens",
        ),
    ):
        code, _, err = launcher(*arguments, *overrides)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
        code, out, _ = launcher(*arguments, *overrides, "--dryrun")
        assert code == 0 and f"not ready here: {message}" in out
    assert os.listdir(workplace) == []


def test_broken_teacher_config_names_the_file(launcher, teacher):
    (teacher / "config.json").write_text('{"model_type": "qwen2"')
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}")
    assert code == 2
    assert str(teacher / "config.json") in err and len(err.strip().splitlines()) == 1


def test_unset_variable_is_an_error_for_a_run_and_a_note_for_a_dry_run(launcher, workplace, monkeypatch):
    monkeypatch.delenv("JET_TEACHERS", raising=False)
    code, _, err = launcher("run", "jet_nemotron_2b")
    assert code == 2
    assert "the environment variable JET_TEACHERS is not set" in err
    code, out, _ = launcher("run", "jet_nemotron_2b", "--dryrun")
    assert code == 0
    assert "1.965B parameters" in out and "157.2 MiB" in out and "JET_TEACHERS is not set" in out
    for hours in ("808", "3,120", "624", "5,616", "7,536"):
        assert f" {hours} " in out
    assert os.listdir(workplace) == []


def test_dry_run_as_json_holds_config_and_estimate(launcher, workplace, teacher):
    arguments = ("run", "tiny", f"teacher.path={teacher}", "placement.budget=1", "--dryrun", "--json")
    code, out, _ = launcher(*arguments)
    plan = json.loads(out)
    assert code == 0
    assert plan["config"]["placement"]["budget"] == 1
    assert plan["command"][1:3] == ["-m", "stand_in_worker"]
    assert [stage["stage"] for stage in plan["estimate"]][:2] == ["prepare", "placement"]
    assert os.listdir(workplace) == []


def test_dry_run_into_a_run_with_another_config_is_refused(launcher, teacher):
    assert launcher("run", "tiny", f"teacher.path={teacher}", "--stages", "prepare", "--output", "runs/a")[0] == 0
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", "seed=1", "--output", "runs/a", "--dryrun")
    assert code == 2
    assert "seed (0 there, 1 here)" in err


def test_run_as_json_prints_one_object_on_stdout(launcher, teacher):
    arguments = ("run", "tiny", f"teacher.path={teacher}", "--stages", "prepare", "--output", "runs/a", "--json")
    code, out, err = launcher(*arguments)
    summary = json.loads(out)
    assert (code, summary["exit_code"], summary["stages"][0]["state"]) == (0, 0, "done")
    assert "prepare: done" in err


def test_config_of_a_run_is_a_recipe(launcher, teacher):
    launcher("run", "tiny", f"teacher.path={teacher}", "seed=4", "--stages", "prepare", "--output", "runs/a")
    code, _, _ = launcher("run", "runs/a/config.yaml", "--stages", "prepare", "--output", "runs/b")
    assert code == 0
    assert Path("runs/a/config.yaml").read_bytes() == Path("runs/b/config.yaml").read_bytes()


def test_own_recipe_by_module_and_function(launcher, teacher, workplace, monkeypatch):
    (workplace / "my_recipes.py").write_text(
        "from megatron_jet.configs.recipes.tiny import tiny\n"
        "def small():\n    return tiny().replace(recipe='small')\n"
        "def wrong():\n    return {'recipe': 'wrong'}\n"
    )
    monkeypatch.syspath_prepend(str(workplace))
    code, out, _ = launcher("run", "my_recipes:small", f"teacher.path={teacher}", "--dryrun")
    assert code == 0 and "would run in runs/small-" in out
    code, _, err = launcher("run", "my_recipes:wrong")
    assert code == 2 and "returned dict, not RunConfig" in err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["list"], ["status", "a"], ["run", "jet_nemotron_2b", "--dryrun"]]
)
def test_works_without_torch(workplace, launcher, teacher, arguments):
    launcher("run", "tiny", f"teacher.path={teacher}", "--stages", "prepare", "--output", "runs/a")
    blocked = BLOCKER + f"sys.argv = ['postnas.py', *{arguments!r}]\nimport runpy\n"
    blocked += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    result = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_disk_smaller_than_the_forecast_is_refused(launcher, workplace, teacher, monkeypatch):
    monkeypatch.setattr("jet_launcher.forecast.free_bytes", lambda path: 1 << 20)
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", "--output", "runs/a")
    assert code == 1
    assert "the run needs up to" in err and "1,024.0 KiB free" in err
