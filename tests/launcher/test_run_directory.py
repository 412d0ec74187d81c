"""Making, continuing and finding run directories; bad places are one clear line."""

import errno
import os

import pytest

from jet_launcher import run_directory
from jet_launcher.run_directory import check_directory, choose_stages, find_run, list_runs, open_run
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.stages import STAGE_ORDER


def test_new_run_gets_a_directory_of_its_own_and_the_whole_config(tmp_path):
    first, second = open_run(tiny(), None, tmp_path), open_run(tiny(), None, tmp_path)
    assert first.path != second.path
    assert first.id.startswith("tiny-2")
    assert first.config() == tiny()
    assert {run.path for run in list_runs(tmp_path)} == {first.path, second.path}


def test_same_config_continues_and_another_is_refused_by_key(tmp_path):
    out = tmp_path / "r"
    open_run(tiny(), out)
    assert open_run(tiny(), out).config() == tiny()
    changed = apply_overrides(tiny(), ["placement.training.steps=7", "seed=5"])
    with pytest.raises(UserError, match=r"seed \(0 there, 5 here\); placement\.training\.steps \(\d+ there, 7 here\)"):
        open_run(changed, out)


def test_many_differences_are_counted_not_listed(tmp_path):
    out = tmp_path / "r"
    open_run(tiny(), out)
    overrides = ["seed=1", "nproc=2", *(f"{stage}.training.steps=3" for stage in ("placement", "stage1", "stage2"))]
    changed = apply_overrides(tiny(), [*overrides, "new_block.training.steps=3", "hardware_search.training.steps=3"])
    with pytest.raises(UserError, match="and 2 more"):
        open_run(changed, out)


def test_foreign_directory_and_file_are_refused_untouched(tmp_path):
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and is not a run directory"):
        open_run(tiny(), foreign)
    assert os.listdir(foreign) == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file"):
        open_run(tiny(), foreign / "thesis.txt")
    (tmp_path / "empty").mkdir()
    assert open_run(tiny(), tmp_path / "empty").config() == tiny()


def test_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        open_run(tiny(), tmp_path / "file" / "run")


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        open_run(tiny(), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_find_run_by_name_and_path(tmp_path):
    run = open_run(tiny(), tmp_path / "runs" / "a")
    assert find_run("a", tmp_path / "runs").path == run.path
    assert find_run(str(run.path), tmp_path / "elsewhere").path == run.path
    with pytest.raises(UserError, match=r"no run 'b'.*known: a"):
        find_run("b", tmp_path / "runs")


def test_config_written_by_hand_with_a_typo_names_file_and_key(tmp_path):
    run = open_run(tiny(), tmp_path / "a")
    run.config_file.write_text(run.config_file.read_text().replace("seed:", "sead:"))
    with pytest.raises(UserError, match=r"config\.yaml: .*sead: unknown key, did you mean 'seed'"):
        check_directory(tiny(), run)


def test_stages_run_in_order_and_bring_prepare_along():
    config = tiny()
    assert choose_stages(config, None) == STAGE_ORDER
    assert choose_stages(config, "stage1, placement") == ("prepare", "placement", "stage1")
    assert choose_stages(config, "report") == ("report",)
    with pytest.raises(UserError, match=r"unknown stage 'plaecment'.*placement"):
        choose_stages(config, "plaecment")
    with pytest.raises(UserError, match="--stages is empty"):
        choose_stages(config, ",")


def test_recipe_name_cannot_leave_the_runs_directory(tmp_path):
    run = open_run(tiny().replace(recipe="../../etc: x"), None, tmp_path)
    assert run.path.parent == tmp_path
    assert run_directory.list_runs(tmp_path)
