"""Other runs, unreadable folders and full disks: they stop nobody, and what they do stop says so in one line."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jet_launcher.run_directory import open_run
from megatron_jet.configs.files import write_json
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny

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


def _as_others() -> None:
    """root reads every file; a child without these two capabilities does not."""
    prctl = ctypes.CDLL(None).prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; refused to others, who lack them anyway


def postnas(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCHER), *map(str, arguments)]
    return subprocess.run(command, stdout=options.pop("stdout", subprocess.PIPE), stderr=subprocess.PIPE, text=True,
                          preexec_fn=_as_others, **options)  # fmt: skip


def one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr


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
    for i, text in enumerate(ODD_RESULTS):
        other = open_run(tiny(), Path(f"runs/other{i}"))
        result = other.stage("prepare") / "result.json"
        result.parent.mkdir(parents=True)
        result.write_text(text)
        (other.stage("stage1")).mkdir()
        write_json(other.stage("stage1") / "result.json", {"measured": {"seconds": 7}})
        (other.stage("export") / "result.json").mkdir(parents=True)
    code, _, err = launcher("run", "tiny", f"teacher.path={teacher}", "--stages", "prepare")
    assert (code, err) == (0, "")
    code, out, _ = launcher("list", "--json")
    assert code == 0 and len(json.loads(out)["runs"]) == len(ODD_RESULTS) + 1


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


def test_closed_run_is_one_row_of_the_list(closed):
    done = postnas("list", "--json")
    rows = {row["id"]: row for row in json.loads(done.stdout)["runs"]}
    assert rows["open"]["state"] == "pending"
    assert rows["closed"]["state"] == "unreadable" and "Permission denied" in rows["closed"]["error"]
    for command in ("status", "logs", "clean", "report", "cancel", "resume"):
        one_line(postnas(command, "closed"), "Permission denied")


def test_closed_stage_folder_is_one_line_and_one_row(workplace):
    run = open_run(tiny(), Path("runs/a"))
    open_run(tiny(), Path("runs/b"))
    run.stage("prepare").mkdir(parents=True)
    (run.path / "stages").chmod(0)
    try:
        rows = {row["id"]: row["state"] for row in json.loads(postnas("list", "--json").stdout)["runs"]}
        assert rows == {"a": "unreadable", "b": "pending"}
        one_line(postnas("status", "a"), "Permission denied")
        one_line(postnas("logs", "a", "prepare"), "Permission denied")
    finally:
        (run.path / "stages").chmod(0o755)


def test_closed_run_does_not_keep_another_from_starting(closed, teacher):
    done = postnas("run", "tiny", f"teacher.path={teacher}", "--stages", "prepare")
    assert done.returncode == 0, done.stderr


def test_closed_home_is_no_traceback(workplace, teacher):
    home = workplace / "home"
    home.mkdir(mode=0)
    try:
        environment = {**os.environ, "HOME": str(home)}
        environment.pop("XDG_CONFIG_HOME", None)
        done = postnas("run", "tiny", f"teacher.path={teacher}", "--dryrun", env=environment)
        assert done.returncode == 0, done.stderr
        one_line(postnas("run", "tiny", "--cluster", "nowhere", env=environment), "cluster 'nowhere' is not known")
    finally:
        home.chmod(0o755)


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
    for command in (("list",), ("status", "a"), ("list", "--json"), ("clean", "a")):
        with open("/dev/full", "w") as full:
            one_line(postnas(*command, stdout=full), "No space left on device")


def test_read_only_run_is_not_half_removed(workplace):
    run = open_run(tiny(), Path("runs/a"))
    (run.path / "sub").mkdir()
    (run.path / "sub" / "file").write_text("x")
    (run.path / "sub").chmod(0o555)
    try:
        one_line(postnas("clean", "a", "--all"), "Permission denied")
    finally:
        (run.path / "sub").chmod(0o755)


def test_names_that_no_terminal_can_show(workplace, teacher):
    done = postnas("run", "tiny", f"teacher.path={teacher}", "--output", b"run-\xff".decode(errors="surrogateescape"),
                   "--dryrun")  # fmt: skip
    assert done.returncode == 0 and "run-\\udcff" in done.stdout
    config = Path("mine.yaml")
    config.write_text(dump_yaml(tiny()).replace("bundled:tiny", '"a\\0b"'))
    one_line(postnas("run", config), "teacher.path")
