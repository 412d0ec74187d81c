"""What befalls a training job from outside: a stop at its very end, damaged checkpoints, weights that go bad."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_jet.configs.checksums import verification, verify
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.configs.signals import Interrupted
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
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


@pytest.fixture
def stopped(single_rank, tmp_path, tmp_path_factory):
    """A job with checkpoints after steps 2 and 4 that a kill ended; and what the undisturbed job gives."""
    case = job(tmp_path, training={"steps": 5})
    write_models(case)
    reference = tmp_path_factory.mktemp("reference") / "run"
    expected = run_job(replace(case, out=reference))

    def die(row: dict) -> None:
        if row["step"] == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run_job(case, die)
    return case, expected


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    """Zeros in 512 bytes, as a lost block gives."""
    content = path.read_bytes()
    middle = min(len(content) // 2, len(content) - 512)
    path.write_bytes(content[:middle] + bytes(512) + content[middle + 512 :])


DAMAGES = {
    "weights": ("model/__0_0.distcp", flip),
    "zeros": ("model/__0_1.distcp", zero),
    "optimiser": ("state/__0_0.distcp", zero),
    "model index": ("model/.metadata", flip),
    "state index": ("state/.metadata", zero),
    "end mark": ("state/metadata.json", lambda path: path.write_text(path.read_text().replace("1", "2"))),
    "marker": ("complete.json", lambda path: path.write_text('{"step": 4}')),
    "layout": ("complete.json", lambda path: path.write_text(path.read_text().replace('"world": 1', '"world": 2'))),
    "marker list": ("complete.json", lambda path: path.write_text("[]")),
    "checksums": ("model/checksums.json", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_in_any_file_passes_a_checkpoint_over(stopped, caplog, damage):
    case, expected = stopped
    name, harm = DAMAGES[damage]
    harm(case.out / "checkpoints" / "step-00000004" / name)
    result = run_job(case)
    assert "step-00000004 is not usable and passed over" in caplog.text
    assert result.final_losses == expected.final_losses
    assert same_weights(result, expected)


def same_weights(one: TrainResult, other: TrainResult) -> bool:
    a, b = GlobalCheckpoint(one.checkpoint), GlobalCheckpoint(other.checkpoint)
    return {*a} == {*b} and all(torch.equal(a.read(key), b.read(key)) for key in a)


def test_checkpoints_from_before_there_were_checksums_still_load(stopped, caplog):
    case, expected = stopped
    for path in case.out.rglob("checksums.json"):
        path.unlink()
    for path in case.out.rglob("complete.json"):
        marker = read_json(path)
        del marker["hash"]
        marker["files"] = {name: size for name, size in marker["files"].items() if "checksums" not in name}
        write_json(path, marker)
    result = run_job(case)
    assert "not usable" not in caplog.text and same_weights(result, expected)


def test_damage_is_not_looked_for_where_nobody_wants_it(stopped, caplog):
    case, _ = stopped
    flip(case.out / "checkpoints" / "step-00000004" / "model" / "__0_0.distcp")
    with verification(False):
        run_job(case)
    assert "not usable" not in caplog.text


def test_a_damaged_last_checkpoint_is_made_anew(single_rank, tmp_path, monkeypatch, caplog):
    """A kill between the last save and train_result.json, and damage before the job is started again."""
    case = job(tmp_path, training={"steps": 3})
    write_models(case)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        before(patch, TrainResult, "save", raise_killed)
        run_job(case)
    last = case.out / "checkpoints" / "step-00000003"
    flip(last / "model" / "__0_0.distcp")
    result = run_job(case)
    assert "step-00000003 is not usable" in caplog.text
    assert result.checkpoint == last / "model"
    verify(result.checkpoint)
    assert run_job(case) == result
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-00000002", "step-00000003"]


def raise_killed() -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("name", ["step-00000003/model", "best-00000003"])
def test_finished_weights_that_are_damaged_are_trained_again(single_rank, tmp_path, caplog, name):
    case = job(tmp_path, training={"steps": 3, "validation_interval": 3, "validation_batches": 1, "keep_best": True})
    write_models(case)
    first = run_job(case)
    flip(case.out / "checkpoints" / name / "__0_0.distcp")
    again = run_job(case)
    assert f"{name}: __0_0.distcp is not what was written" in caplog.text and "trained again" in caplog.text
    assert again.final_losses == first.final_losses
    assert same_weights(again, replace(first, checkpoint=again.checkpoint))


def test_good_checkpoints_outlive_newer_broken_ones(stopped):
    """What is kept is counted from the step that was saved last."""
    case, _ = stopped
    folder = case.out / "checkpoints"
    flip(folder / "step-00000004" / "model" / "__0_0.distcp")
    shutil.copytree(folder / "step-00000004", folder / "step-00000005")

    def stop(row: dict) -> None:
        if row["step"] == 3:
            terminate()

    with pytest.raises(Interrupted):
        run_job(case, stop)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


def spoil(trainer: Trainer, what: str) -> None:
    parameter = next(p for p in trainer.student[0].parameters() if p.requires_grad)
    if what == "weights":
        parameter.data.view(-1)[3] = float("nan")
    else:
        trainer.optimizer.state_of(parameter)["exp_avg"].view(-1)[3] = float("inf")


@pytest.mark.parametrize(("what", "step"), [("weights", 4), ("weights", 5), ("optimiser", 4)])
def test_what_is_not_finite_is_not_saved(single_rank, tmp_path, monkeypatch, what, step):
    """After any step, the last one included: the checkpoint before stays, and running again gets out of it."""
    case = job(tmp_path, training={"steps": 5})
    write_models(case)
    real = Trainer.train_step

    def step_and_spoil(self, stop):
        stopping = real(self, stop)
        if self.progress.step == step:
            spoil(self, what)
        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_spoil)
        with pytest.raises(UserError, match=f"step {step}: .* is not finite.*is intact. Run again") as raised:
            run_job(case)
    assert "\n" not in str(raised.value)
    newest = sorted((case.out / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{2 if step == 4 else 4:08d}"
    assert run_job(case).steps == 5


def test_the_best_weights_are_finite(single_rank, tmp_path, monkeypatch):
    case = job(tmp_path, training={"steps": 4, "validation_interval": 2, "validation_batches": 1, "keep_best": True})
    write_models(case)
    real = Trainer._losses

    def losses(self, terms):
        found = real(self, terms)
        first = not torch.is_grad_enabled() and self.progress.step == 2
        return {**found, "loss": float("nan")} if first else found

    monkeypatch.setattr(Trainer, "_losses", losses)
    assert run_job(case).best_checkpoint.name == "best-00000004"
