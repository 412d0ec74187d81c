"""Stop requests and what a user sees without a terminal."""

import os
import signal

import pytest

from megatron_jet.configs.signals import SIGNALS, StopRequest
from megatron_jet.training.progress import TrainingProgress


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_noted_and_handlers_given_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.signal == number
    assert signal.getsignal(number) == before


def test_second_ctrl_c_stops_at_once():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_plain_lines_without_a_terminal(capsys):
    progress = TrainingProgress("stage1", total_steps=40, done=10, line_seconds=0.0)
    progress.start()
    progress.step(11, {"loss": 1.5, "kl": 0.25, "cross_entropy": 0.0}, 12345.6)
    progress.line_seconds = 1e9
    progress.step(12, {"loss": 1.4}, 1.0)  # too soon for another line
    progress.step(40, {"loss": 1.0}, 2.0)  # the last one always shows
    progress.stop()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("stage1: step 11/40  loss 1.5000  kl 0.2500  12,346 tok/s  ")
    assert lines[0].endswith("left")
    assert lines[1:] == ["stage1: step 40/40  loss 1.0000  2 tok/s  done"]
