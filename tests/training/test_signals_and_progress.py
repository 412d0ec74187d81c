"""Stop requests and what a user sees without a terminal."""

import contextlib
import os
import signal

import pytest
from torch.distributed.checkpoint import CheckpointException

from megatron_jet.configs.directories import stop_if_interrupted
from megatron_jet.configs.signals import SIGNALS, Interrupted, StopRequest, interruptible
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


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_that_came_too_late_to_be_looked_at_is_handed_on(number):
    """As between the last step of a stage and the start of the next one."""
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name):
        with interruptible():
            with StopRequest():
                os.kill(os.getpid(), number)
            raise AssertionError("the next piece of work was started")
    assert signal.getsignal(number) == before


def test_a_request_that_was_answered_or_overtaken_by_an_error_is_not_raised_twice():
    with pytest.raises(ValueError, match="answer"), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("answer")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("swallow", ["destructor", "reader"])
def test_a_swallowed_interruption_still_ends_the_block(swallow):
    """Python drops what is raised in a destructor; a library may catch anything."""

    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            len("here the handler runs")

    def read() -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            len("here the handler runs")

    with pytest.raises(Interrupted), interruptible():
        if swallow == "destructor":
            Dropped()
        else:
            read()


def test_an_error_that_came_of_the_interruption_is_an_interruption():
    """The other process left first, and what is seen of it is a lost connection."""
    with pytest.raises(Interrupted), interruptible():
        with contextlib.suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("connection closed by peer")


def test_a_stop_inside_torchs_checkpoint_reader_is_a_stop():
    """torch catches everything and raises its own; a reader that knows it only would say 'damaged'."""
    failures = {0: (Interrupted("stopped by SIGTERM"), None)}
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop_if_interrupted(CheckpointException("failed", failures))
    damage = ValueError("damaged")
    damage.__context__ = CheckpointException("failed", {0: (damage, None)})  # as when it is raised out of it
    stop_if_interrupted(damage)
