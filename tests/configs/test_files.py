"""Small files: whole or not at all, what a kill leaves is swept, changes are noticed."""

import os
import subprocess
import sys
import time

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_written, temporary_beside, write_checked, write_json, write_text

KILLED = """
import os, sys
from pathlib import Path
from megatron_jet.configs import files
files.os.replace = lambda *args: os.kill(os.getpid(), 9)
files.write_text(Path(sys.argv[1]), "half")
"""


def test_what_a_kill_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "status.json"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -9
        assert len(list(tmp_path.iterdir())) == 1
    write_text(path, "whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"] and path.read_text() == "whole"


def test_what_others_are_writing_stays(tmp_path):
    """A process that lives; one on another machine, unless it is old."""
    path = tmp_path / "status.json"
    alive = temporary_beside(path)
    elsewhere = tmp_path / f".status.json.partial-00000000-{os.getpid()}-1234"
    other_file = tmp_path / ".status.json2.partial-00000000-1-1234"
    old = tmp_path / ".status.json.partial-00000000-1-1234"
    for temporary in (alive, elsewhere, other_file, old):
        temporary.write_text("half")
    os.utime(old, (time.time() - 1e6,) * 2)
    write_text(path, "whole")
    assert {*tmp_path.iterdir()} == {path, alive, elsewhere, other_file}


def test_a_changed_file_is_told_from_the_written_one(tmp_path):
    path = tmp_path / "result.json"
    write_checked(path, {"loss": 1.5})
    assert read_written(path)["loss"] == 1.5
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(UserError, match=r"result\.json: is not what was written"):
        read_written(path)
    write_checked(path, {"loss": 1.6})
    assert read_written(path)["loss"] == 1.6


def test_a_file_without_a_hash_is_from_before(tmp_path):
    write_json(tmp_path / "result.json", {"loss": 1.5})
    assert read_written(tmp_path / "result.json")["loss"] == 1.5


def test_a_folder_in_the_place_of_a_record_gives_way(tmp_path):
    (tmp_path / "result.json" / "inside").mkdir(parents=True)
    write_checked(tmp_path / "result.json", {"loss": 1.5})
    assert read_written(tmp_path / "result.json")["loss"] == 1.5
