"""What befalls a training job from outside: a stop at its very end, damaged checkpoints, weights that go bad."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_jet.configs.checksums import verification
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.configs.signals import Interrupted
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
from megatron_jet.training.checkpoint_folder import CheckpointFolder
from megatron_jet.training.job import TrainResult
from megatron_jet.training.metrics import cut_rows
from megatron_jet.training.parallel import destroy_parallel, init_parallel
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A job that ran undisturbed: checkpoints after steps 2 and 3, of three."""
    init_parallel(ParallelConfig(), seed=0)
    case = job(tmp_path_factory.mktemp("finished"), training={"steps": 3})
    write_models(case)
    result = run_job(case)
    destroy_parallel()
    return case, result


@pytest.fixture
def killed(single_rank, finished, tmp_path):
    """The same job, killed between its last save and its result; and the result that it should have."""
    case, expected = finished
    shutil.copytree(case.out, tmp_path / "run")
    for path in (tmp_path / "run").glob("train_result.json*"):
        path.unlink()
    return replace(case, out=tmp_path / "run"), expected


def flip(path: Path) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    """Zeros in up to 512 bytes, as a lost block gives."""
    content = path.read_bytes()
    start = max(0, len(content) // 2 - 256)
    path.write_bytes(content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(content: str):
    return lambda path: path.write_text(content)


def swap(old: str, new: str):
    def change(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


ODD_MARKERS = [rewrite(text) for text in ('{"step": 4}', "[]", "null", "", '{"files": 3, "step": 1}')]
ODD_MARKERS += [swap('"world": 1', '"world": 2'), swap('"step": 3', '"step": 2')]


def test_damage_in_any_file_passes_a_checkpoint_over(killed, caplog):
    """Loaded into one trainer again and again; each time the newest is damaged in another file."""
    case, _ = killed
    newest = case.out / "checkpoints" / "step-00000003"
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert {"model/.metadata", "state/.metadata", "state/metadata.json", "model/checksums.json"} < {*files}
    harms = [(name, harm) for name in files for harm in (flip, zero, cut)]
    harms += [("complete.json", harm) for harm in ODD_MARKERS] + [("model/checksums.json", rewrite("{}"))]
    trainer = Trainer(case)
    assert trainer.progress.step == 3
    for name, harm in harms:
        good = (newest / name).read_bytes()
        harm(newest / name)
        caplog.clear()
        progress, _ = trainer.folder.load_latest(trainer.student, trainer.optimizer)
        assert progress.step == 2, (name, harm)
        assert "step-00000003 is not usable and passed over" in caplog.text, (name, harm)
        (newest / name).write_bytes(good)
    assert trainer.folder.load_latest(trainer.student, trainer.optimizer)[0].step == 3


def same_weights(one: TrainResult, other: TrainResult) -> bool:
    a, b = GlobalCheckpoint(one.checkpoint), GlobalCheckpoint(other.checkpoint)
    return {*a} == {*b} and all(torch.equal(a.read(key), b.read(key)) for key in a)


def test_checkpoints_from_before_there_were_checksums_still_load(killed, caplog):
    """Damage in one of them that shows when it is read passes it over as well."""
    case, expected = killed
    for path in case.out.rglob("checksums.json"):
        path.unlink()
    for path in case.out.rglob("complete.json"):
        marker = read_json(path)
        del marker["hash"]
        marker["files"] = {name: size for name, size in marker["files"].items() if "checksums" not in name}
        write_json(path, marker)
    trainer = Trainer(case)
    assert trainer.progress.step == 3 and "not usable" not in caplog.text
    newest = case.out / "checkpoints" / "step-00000003"
    for name in ("model/.metadata", "state/.metadata", "state/__0_0.distcp"):
        good = (newest / name).read_bytes()
        (newest / name).write_bytes(bytes(len(good)))
        assert trainer.folder.load_latest(trainer.student, trainer.optimizer)[0].step == 2, name
        (newest / name).write_bytes(good)


def test_damage_is_not_looked_for_where_nobody_wants_it(killed, caplog):
    case, _ = killed
    (case.out / "checkpoints" / "step-00000003" / "model" / "checksums.json").write_text("{}")
    marker = case.out / "checkpoints" / "step-00000003" / "complete.json"
    plain = read_json(marker)
    plain["files"]["model/checksums.json"] = 2
    del plain["hash"]
    write_json(marker, plain)
    with verification(False):
        assert Trainer(case).progress.step == 3
    assert Trainer(case).progress.step == 2


def test_a_damaged_last_checkpoint_is_made_anew(killed, caplog):
    """A kill between the last save and train_result.json, and damage before the job is started again."""
    case, expected = killed
    last = case.out / "checkpoints" / "step-00000003"
    flip(last / "model" / "__0_0.distcp")
    result = run_job(case)
    assert "step-00000003 is not usable" in caplog.text
    assert result.checkpoint == last / "model" and result.final_losses == expected.final_losses
    assert same_weights(result, expected)
    assert run_job(case) == result
    assert sorted(path.name for path in last.parent.iterdir()) == ["step-00000002", "step-00000003"]


def test_finished_weights_that_are_damaged_are_trained_again(single_rank, finished, tmp_path, caplog):
    """Also where nothing else is left of the job, as after a finished stage."""
    case, expected = finished
    case = replace(case, out=Path(shutil.copytree(case.out, tmp_path / "run")))
    shutil.rmtree(case.out / "checkpoints" / "step-00000002")
    shutil.rmtree(case.out / "checkpoints" / "step-00000003" / "state")
    flip(case.out / "checkpoints" / "step-00000003" / "model" / "__0_0.distcp")
    again = run_job(case)
    assert "__0_0.distcp is not what was written" in caplog.text and "trained again" in caplog.text
    assert same_weights(again, expected)
    assert run_job(case) == again


ODD_RESULTS = ("[]", "{}", "null", "", '{"config_hash": "x"}', '{"config_hash": 3, "measured": null}', "\0")


def test_an_odd_training_result_does_not_count(single_rank, finished, tmp_path, caplog):
    case, expected = finished
    case = replace(case, out=Path(shutil.copytree(case.out, tmp_path / "run")))
    assert TrainResult.load(case) == replace(expected, checkpoint=case.out / "checkpoints" / "step-00000003" / "model")
    path = case.out / "train_result.json"
    written = path.read_text()
    path.write_text(written.replace('"steps": 3', '"steps": 4'))
    assert TrainResult.load(case) is None and "train_result.json: is not what was written" in caplog.text
    (case.out / "train_result.json.sha256").unlink()
    content = read_json(path)
    for odd in (*ODD_RESULTS, json.dumps({**content, "measured": 3}), json.dumps({**content, "more": 3})):
        path.write_text(odd)
        assert TrainResult.load(case) is None, odd
    elsewhere = tmp_path / "elsewhere" / "model"
    elsewhere.mkdir(parents=True)
    for named in ("../elsewhere/model", str(elsewhere), "checkpoints/../../elsewhere/model", "", "checkpoints"):
        for key in ("checkpoint", "best_checkpoint"):
            path.write_text(json.dumps({**content, key: named}))
            assert TrainResult.load(case) is None and "is no checkpoint of this job" in caplog.text, named
    assert elsewhere.is_dir(), "what is damaged is set aside, of the job's own only"
    path.unlink()
    path.mkdir()
    assert TrainResult.load(case) is None
    assert same_weights(run_job(case), expected)


def test_good_checkpoints_outlive_newer_broken_ones(killed):
    """What is kept is counted from the step that was saved last."""
    case, _ = killed
    folder = case.out / "checkpoints"
    flip(folder / "step-00000003" / "model" / "__0_0.distcp")
    for step in (4, 5):
        shutil.copytree(folder / "step-00000003", folder / f"step-{step:08d}")
    trainer = Trainer(case)
    trainer.seconds_before = 0.0
    trainer.save()
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_odd_rows_of_metrics_are_dropped_with_a_line(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    row = json.dumps({"step": 1, "split": "train"})
    for content in (f"[]\n{row}\n", f"null\n3\n{row}\n", f'{{"step": "x"}}\n{row}\n', f"\0\0\n{row}\n"):
        path.write_text(content)
        caplog.clear()
        cut_rows(path, 3)
        assert path.read_text() == f"{row}\n" and "cannot be read" in caplog.text
    path.write_bytes(b"\xff\x00\xfe" * 9)
    cut_rows(path, 3)
    assert path.read_text() == ""
    path.unlink()
    path.mkdir()
    cut_rows(path, 3)
    assert not path.exists()


def spoil(trainer: Trainer, what: str) -> None:
    parameter = next(p for p in trainer.student[0].parameters() if p.requires_grad)
    if what == "weights":
        parameter.data.view(-1)[3] = float("nan")
    else:
        trainer.optimizer.state_of(parameter)["exp_avg"].view(-1)[3] = float("inf")


@pytest.mark.parametrize(("what", "step"), [("weights", 2), ("weights", 3), ("optimiser", 2)])
def test_what_is_not_finite_is_not_saved(single_rank, tmp_path, monkeypatch, what, step):
    """After any step, the last one included: the checkpoint before stays, and running again gets out of it."""
    case = job(tmp_path, training={"steps": 3, "checkpoint_interval": 1})
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
    assert newest.name == f"step-{step - 1:08d}"
    assert run_job(case).steps == 3


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


def two_ranks(out: Path) -> tuple[str, int]:
    """Worker: rank 1 alone is told to stop after the last step; then a file is damaged that either rank may look at."""
    case = job(out, training={"steps": 3, "validation_interval": 3, "validation_batches": 1})
    write_models(case)
    real = Trainer.validate

    def validate(self):
        if dist.get_rank() == 1:
            terminate()
        real(self)

    Trainer.validate = validate
    try:
        run_job(case)
    except Interrupted as error:
        said = str(error)
    finally:
        Trainer.validate = real
    newest = case.out / "checkpoints" / "step-00000003"
    dist.barrier()
    if dist.get_rank() == 0:
        flip(newest / "state" / "__1_0.distcp")
    dist.barrier()
    return said, Trainer(case).progress.step


def test_ranks_agree_on_a_late_stop_and_on_damage(pool, tmp_path):
    said = "test: stopped after its last step, result saved"
    assert pool.run(two_ranks, tmp_path, world_size=2) == [(said, 2)] * 2
