"""Scripts fail early and in one line."""

import argparse
import os
import signal
from pathlib import Path

import pytest

from megatron_jet.configs.command_line import lengths, output_file, positive, run_tool, seed
from megatron_jet.configs.errors import UsageError, UserError
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.recipes.catalog import load_recipe
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.teacher_source import expand_paths


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x: wrong"), 1, "error: x: wrong\n"),
        (OSError(28, "No space left on device", "/a/b"), 1, "error: /a/b: No space left on device\n"),
        (UsageError("x: unknown"), 2, "error: x: unknown\n"),
        (OSError(28, "No space left on device"), 1, "error: the output cannot be written (No space left on device)\n"),
        (KeyboardInterrupt(), 75, "error: interrupted\n"),
    ],
)
def test_errors_are_one_line(error, code, line, capsys):
    assert run_tool(raising(error)) == code
    assert capsys.readouterr().err == line


def test_a_script_may_say_what_an_interruption_left(capsys):
    assert run_tool(raising(KeyboardInterrupt()), interrupted="interrupted; nothing was written") == 75
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_every_tool_ends_on_signals_as_on_ctrl_c(number, capsys):
    """Those that only measure as well: 75 and one line, and what was there before is there again."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert run_tool(lambda: os.kill(os.getpid(), number) or signal.pause()) == 75
        assert capsys.readouterr().err == "error: interrupted\n"
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # nohup
        assert run_tool(lambda: os.kill(os.getpid(), number) or 3) == 3
    finally:
        signal.signal(number, before)
    tools = Path(__file__).resolve().parents[2] / "tools"
    for script in tools.glob("*.py"):
        if "argparse" in script.read_text():  # the others print something and end
            assert "run_tool(" in script.read_text(), script


def test_unknown_names_and_bad_values_exit_2(capsys):
    """Whatever tool asks for them."""
    from megatron_jet.evaluation.device import find_device
    from megatron_jet.evaluation.presets import find_preset, paper_scores

    for ask in (
        lambda: load_recipe("tinny"),
        lambda: load_recipe("nowhere:recipe"),
        lambda: apply_overrides(tiny(), ["seed=-1"]),
        lambda: expand_paths(apply_overrides(tiny(), ["data.path=${JET_NOT_SET}"])),
        lambda: find_preset("paper-maths"),
        lambda: paper_scores("jet"),
        lambda: find_device("abacus"),
    ):
        assert run_tool(ask) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("text", ["-1", "4294967296", "1.5"])
def test_seeds_fit_into_every_generator(text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        seed(text)
    assert seed("4294967295") == 2**32 - 1


def test_a_mistake_of_ours_stays_visible():
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 / 0)


def test_an_output_is_tried_and_nothing_is_left(tmp_path):
    assert output_file(str(tmp_path / "a" / "b" / "r.json")) == str(tmp_path / "a" / "b" / "r.json")
    assert os.listdir(tmp_path) == []
    (tmp_path / "kept").mkdir()
    (tmp_path / "file").touch()
    output_file(str(tmp_path / "kept" / "r.json"))
    assert sorted(os.listdir(tmp_path)) == ["file", "kept"]
    for bad in (tmp_path, tmp_path / "file" / "r.json", "/proc/nope/r.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="r.json cannot be written|is a directory"):
            output_file(str(bad))


def test_numbers():
    assert positive("3") == 3 and lengths("4,8") == (4, 8)
    for text in ("0", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            positive(text)
