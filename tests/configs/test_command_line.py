"""Scripts fail early and in one line."""

import argparse
import os

import pytest

from megatron_jet.configs.command_line import lengths, output_file, positive, run_tool
from megatron_jet.configs.errors import UserError


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x: wrong"), 1, "error: x: wrong\n"),
        (OSError(28, "No space left on device", "/a/b"), 1, "error: /a/b: No space left on device\n"),
        (KeyboardInterrupt(), 75, "error: interrupted\n"),
    ],
)
def test_errors_are_one_line(error, code, line, capsys):
    assert run_tool(raising(error)) == code
    assert capsys.readouterr().err == line


def test_a_script_may_say_what_an_interruption_left(capsys):
    assert run_tool(raising(KeyboardInterrupt()), interrupted="interrupted; nothing was written") == 75
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"


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
