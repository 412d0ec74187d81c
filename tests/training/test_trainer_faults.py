"""What befalls a training job from outside: a stop at its very end, damaged checkpoints, weights that go bad."""

import os
import signal

import pytest

from megatron_jet.configs.signals import Interrupted
from megatron_jet.training.checkpoint_folder import CheckpointFolder
from megatron_jet.training.job import TrainResult
from megatron_jet.training.trainer import Trainer
from training.training_cases import job, run_job, write_models


def before(monkeypatch, owner: type, name: str, action, matches=lambda *args: True) -> None:
    """Have `action` happen at the head of a method."""
    real = getattr(owner, name)

    def wrapped(self, *args, **kwargs):
        if matches(self, *args):
            action()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", ["validate", "save", "finish", "result"])
def test_a_stop_after_the_last_step_is_not_lost(single_rank, tmp_path, monkeypatch, where):
    """No step comes that would look at it; the next stage must not start all the same."""
    case = job(tmp_path, training={"steps": 3, "validation_interval": 3, "validation_batches": 1})
    write_models(case)
    with monkeypatch.context() as patch:
        last = {"validate": lambda self: self.progress.step == 3, "save": lambda self, *_: True}
        if where == "save":
            before(patch, CheckpointFolder, "save", terminate, lambda self, *args: args[2].step == 3)
        elif where == "result":
            before(patch, TrainResult, "save", terminate)
        else:
            before(patch, Trainer, where, terminate, last.get(where, lambda self: True))
        with pytest.raises(Interrupted, match="after its last step"):
            run_job(case)
    finished = TrainResult.load(case)
    assert finished is not None and finished.steps == 3
    assert run_job(case) == finished
