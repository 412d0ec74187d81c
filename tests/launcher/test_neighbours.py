"""Other runs, unreadable folders and full disks: they stop nobody, and what they do stop says so in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jet_launcher.run_directory import open_run
from launcher.without_root import run_commands
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.stages import STAGE_ORDER

LAUNCHER = Path(__file__).parents[2] / "launcher" / "postnas.py"
ODD_RESULTS = (
    "[]",
    "null",
    "7",
    '{"measured": null}',
    '{"measured": {"seconds": "x"}}',
    '{"measured',
    "\0",
    "[" * 5000,
)


def one_line(done: tuple[int, str, str], words: str) -> None:
    code, _, err = done
    assert code in (1, 2), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert words in err


@pytest.fixture
def closed(workplace):
    """A run whose folder nobody may enter, beside one that all may read."""
    open_run(tiny(), Path("runs/open"))
    run = open_run(tiny(), Path("runs/closed"))
    run.path.chmod(0)
    yield run
    run.path.chmod(0o755)


def test_damaged_results_of_another_run_do_not_keep_this_one_from_starting(launcher, teacher):
    """They would tell how long the stages take; the same recipe, so that they are looked at."""
    other = open_run(tiny(), Path("runs/other"))
    for stage, text in zip(STAGE_ORDER, (None, *ODD_RESULTS)):
        result = other.stage(stage) / "result.json"
        result.parent.mkdir(parents=True)
        if text is None:
            result.mkdir()
        else:
            result.write_text(text)
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", "--stages", "prepare")
    assert (code, err) == (0, "")
    code, out, _ = launcher("list", "--json")
    assert code == 0 and len(json.loads(out)["runs"]) == 2


def test_refused_start_leaves_nothing_behind(launcher, teacher, monkeypatch, workplace):
    monkeypatch.setattr("jet_launcher.forecast.free_bytes", lambda path: 1 << 20)
    for output in ("new/folder/run", None):
        where = ["--output", output] if output else []
        code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", *where)
        assert code == 1 and "the disk has" in err
    assert os.listdir(workplace) == []


def test_start_that_fails_at_its_lock_takes_its_config_back(launcher, teacher, monkeypatch, workplace):
    (workplace / "kept").mkdir()
    monkeypatch.setattr("jet_launcher.launch.record_launch", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", "--output", "kept/a/run")
    assert code == 1 and "no space left" in err
    assert os.listdir(workplace) == ["kept"] and os.listdir("kept") == []


def test_closed_run_is_one_row_of_the_list_and_stops_no_other(closed, teacher):
    commands = ("status", "logs", "clean", "report", "cancel", "resume")
    start = ("run", "tiny", f"teacher.path={teacher}", "--stages", "prepare")
    (_, listed, _), (code, _, err), *others = run_commands(
        ("list", "--json"), start, *((command, "closed") for command in commands)
    )
    rows = {row["id"]: row for row in json.loads(listed)["runs"]}
    assert rows["open"]["state"] == "pending"
    assert rows["closed"]["state"] == "unreadable" and "Permission denied" in rows["closed"]["error"]
    assert code == 0, err
    for done in others:
        one_line(done, "Permission denied")


def test_closed_stage_folder_is_one_line_and_one_row(workplace):
    run = open_run(tiny(), Path("runs/a"))
    open_run(tiny(), Path("runs/b"))
    run.stage("prepare").mkdir(parents=True)
    (run.path / "stages").chmod(0)
    try:
        (_, listed, _), *others = run_commands(("list", "--json"), ("status", "a"), ("logs", "a", "prepare"))
    finally:
        (run.path / "stages").chmod(0o755)
    rows = {row["id"]: row["state"] for row in json.loads(listed)["runs"]}
    assert rows == {"a": "unreadable", "b": "pending"}
    for done in others:
        one_line(done, "Permission denied")


def test_closed_home_is_no_traceback(workplace, teacher):
    home = workplace / "home"
    home.mkdir(mode=0)
    environment = {**os.environ, "HOME": str(home)}
    environment.pop("XDG_CONFIG_HOME", None)
    start = ("run", "tiny", f"teacher.path={teacher}", "--dryrun")
    try:
        good, unknown = run_commands(start, ("run", "tiny", "--cluster", "nowhere"), env=environment)
    finally:
        home.chmod(0o755)
    assert good[0] == 0, good[2]
    one_line(unknown, "cluster 'nowhere' is not known")


@pytest.mark.parametrize("key", ["teacher.path", "teacher.tokenizer", "data.path", "--cluster"])
def test_home_of_nobody_is_one_line(launcher, key):
    where = "~nobody-of-this-name/x.yaml"
    asked = (key, where) if key == "--cluster" else (f"{key}={where}",)
    one_line(launcher("run", "tiny", *asked), f"{key}={where}: there is no such home directory")


def test_user_without_a_home_is_no_traceback(launcher, monkeypatch):
    """As containers run with a number that /etc/passwd does not have."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    one_line(launcher("run", "tiny", "--cluster", "nowhere"), "cluster 'nowhere' is not known")


def test_names_that_no_file_can_have(launcher, teacher, workplace):
    long = "x" * 300
    for arguments in (
        ("run", "tiny", f"teacher.path={teacher}", "--output", long),
        ("run", "tiny", f"teacher.path={teacher}", "--output", long, "--dryrun"),
        ("run", "tiny", f"teacher.path={long}"),
        ("run", "tiny", f"data.path={long}"),
        ("run", "tiny", f"teacher.tokenizer={long}"),
        ("run", long),
        ("run", f"{long}.yaml"),
        ("run", "tiny", "--cluster", f"{long}.yaml"),
        ("status", long),
        ("resume", long),
        ("list", "--runs", long),
        ("logs", "--runs", long, "a"),
    ):
        code, _, err = launcher(*arguments)
        assert code in (1, 2), (arguments, err)
        assert err.startswith("error: ") and err.count("\n") == 1, (arguments, err)
    assert os.listdir(workplace) == []


def test_output_that_takes_nothing_is_one_line(workplace):
    open_run(tiny(), Path("runs/a"))
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(LAUNCHER), "list", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    one_line((done.returncode, "", done.stderr), "No space left on device")


def test_report_whose_output_takes_nothing_is_one_line(workplace):
    open_run(tiny(), Path("runs/a"))
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(LAUNCHER), "report", "a"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    one_line((done.returncode, "", done.stderr), "No space left on device")


def test_read_only_run_is_one_line(workplace):
    run = open_run(tiny(), Path("runs/a"))
    (run.path / "sub").mkdir()
    (run.path / "sub" / "file").write_text("x")
    (run.path / "sub").chmod(0o555)
    try:
        (done,) = run_commands(("clean", "a", "--all"))
    finally:
        (run.path / "sub").chmod(0o755)
    one_line(done, "Permission denied")


def test_names_that_no_terminal_can_show(workplace):
    command = [sys.executable, str(LAUNCHER), "run", "tiny", "--output", b"run-\xff", "--dryrun"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "run-\\udcff" in done.stdout, done.stderr


def test_texts_that_no_path_can_hold(launcher, workplace):
    config = Path("mine.yaml")
    config.write_text(dump_yaml(tiny()).replace("bundled:tiny", '"a\\0b"'))
    one_line(launcher("run", config), "teacher.path")
