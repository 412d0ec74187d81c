"""The trainer end to end: resuming, kills, signals, broken checkpoints, non-finite losses, records."""

import errno
import functools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.signals import Interrupted
from megatron_jet.configs.training import LossConfig, ParallelConfig
from megatron_jet.model.state import gather_tensors
from megatron_jet.training import checkpoint_folder
from megatron_jet.training.checkpoint import load_model
from megatron_jet.training.job import TrainJob, TrainResult
from megatron_jet.training.metrics import MetricsLog
from training.training_cases import ONE, built, job, run_job, supernet, write_models

TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)


def weights(result: TrainResult, job: TrainJob) -> dict[str, torch.Tensor]:
    """Final weights in full (rank 0)."""
    model = built(job.model, job.parallel, choices=job.sampling.choices if job.sampling else None)
    load_model(model, result.checkpoint)
    return gather_tensors(model)


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without measured figures."""
    measured = ("tokens_per_second", "memory_mib")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def stop_after(step: int, number: signal.Signals):
    """An observer that sends its own process a signal when a step is logged."""

    def observe(row: dict) -> None:
        if row["step"] == step and row["split"] == "train":
            os.kill(os.getpid(), number)

    return observe


def train_case(out: Path, changes: dict, prepare: bool = True, interrupt: int | None = None):
    """Worker: run a job, perhaps interrupted once, and return (final losses, weights, rows)."""
    case = job(out, **changes)
    if prepare:
        write_models(case)
    if interrupt is not None:
        with pytest.raises(Interrupted):
            run_job(case, stop_after(interrupt, signal.SIGTERM))
        assert TrainResult.load(case) is None
    result = run_job(case)
    return result.final_losses, weights(result, case), rows(case.out)


def kill_worker(out: Path, changes: dict, step: int) -> None:
    """Worker: die by SIGKILL when a step is logged."""
    case = job(out, **changes)
    write_models(case)
    run_job(case, stop_after(step, signal.SIGKILL))


def kill_while_saving(out: Path, changes: dict, files: int) -> None:
    """Worker: die by SIGKILL in the middle of the second checkpoint, after some of its files are there."""
    case = job(out, **changes)
    write_models(case)
    save, calls = checkpoint_folder.save_sharded, []

    def partly(state, path) -> None:
        calls.append(path)
        if len(calls) == 2:
            save(state, path)
            for name in sorted(os.listdir(path))[files:]:
                os.unlink(path / name)
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, path)

    checkpoint_folder.save_sharded = partly
    run_job(case)


def assert_equal(got, expected) -> None:
    assert got[0] == expected[0]
    assert got[1].keys() == expected[1].keys()
    for key in expected[1]:
        assert torch.equal(got[1][key], expected[1][key]), key
    assert got[2] == expected[2]


def assert_close(got, expected, tolerance: float = 2e-4) -> None:
    """Other layouts add in another order, and Adam turns differences of tiny gradients into steps of size lr."""
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    for key, weight in expected[1].items():
        assert (got[1][key] - weight).norm() <= 20 * tolerance * weight.norm() + 1e-6, key


@pytest.fixture(scope="module")
def undisturbed(pool, tmp_path_factory):
    """Uninterrupted runs on one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        "distill": pool.run(train_case, folder / "a", {}, world_size=1)[0],
        "supernet": pool.run(train_case, folder / "b", supernet(), world_size=1)[0],
    }


def test_losses_fall(undisturbed):
    losses = [row["loss"] for row in undisturbed["distill"][2]]
    assert losses[-1] < losses[0]
    assert [row["step"] for row in undisturbed["distill"][2]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("case", ["distill", "supernet"])
def test_resume_is_bit_exact(pool, undisturbed, tmp_path, case):
    changes = supernet() if case == "supernet" else {}
    assert_equal(pool.run(train_case, tmp_path, changes, interrupt=3, world_size=1)[0], undisturbed[case])


def test_two_processes_equal_one_and_resume_bit_exactly(pool, undisturbed, tmp_path):
    """Data-parallel supernet with the distributed optimiser."""
    straight = pool.run(train_case, tmp_path / "a", supernet(), world_size=2)
    assert_close(straight[0], undisturbed["supernet"])
    resumed = pool.run(train_case, tmp_path / "b", supernet(), interrupt=3, world_size=2)
    assert_equal((resumed[0][0], resumed[0][1], resumed[0][2]), straight[0])


class FusedAdam(torch.optim.AdamW):
    """What Transformer Engine's looks like to Megatron: `step` is one number per group."""

    def __init__(self, params, adam_w_mode: bool, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["step"] = 1

    def step(self, closure=None):
        raise NotImplementedError("it runs on GPUs")


def train_beside_transformer_engine(out: Path, changes: dict, interrupt: int | None) -> tuple:
    """Worker: `train_case` as on a machine where Megatron finds Transformer Engine's Adam."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        for module in (optimizer, distrib_optimizer):
            patch.setattr(module, "Adam", FusedAdam)
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
        patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        patch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
        return train_case(out, changes, interrupt=interrupt)


@pytest.mark.parametrize("distributed", [False, True])
def test_supernets_count_steps_by_path_beside_transformer_engine(pool, tmp_path, distributed):
    """Whatever Adam is installed, a path's moments are corrected for the steps it was drawn in; after a resume, too."""
    changes = [supernet({"distributed_optimizer": distributed}) for _ in range(2)]
    expected = pool.run(train_case, tmp_path / "a", changes[0], world_size=1)[0]
    got = pool.run(train_beside_transformer_engine, tmp_path / "b", changes[1], 3, world_size=1)[0]
    assert_equal(got, expected)


def test_plain_training_takes_the_fused_adam(pool, tmp_path):
    with pytest.raises(AssertionError, match="it runs on GPUs"):
        pool.run(train_beside_transformer_engine, tmp_path, {}, None, world_size=1)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("first, second", [((TP2, 2), (PP2, 2)), ((ONE, 2), (ONE, 1))], ids=["tp2-pp2", "dp2-one"])
def test_resume_at_another_layout(pool, undisturbed, tmp_path, first, second, distributed):
    training = {"training": {"distributed_optimizer": distributed}}
    pool.run(interrupted, tmp_path, {"parallel": first[0], **training}, layout=first[0], world_size=first[1])
    changes = {"parallel": second[0], **training}
    got = pool.run(train_case, tmp_path, changes, prepare=False, layout=second[0], world_size=second[1])
    assert_close(got[0], undisturbed["distill"])
    assert [row["step"] for row in got[0][2]] == [1, 2, 3, 4, 5, 6]


def interrupted(out: Path, changes: dict, step: int = 3) -> None:
    """Worker: start a job and stop it."""
    case = job(out, **changes)
    write_models(case)
    with pytest.raises(Interrupted):
        run_job(case, stop_after(step, signal.SIGUSR1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_kill_and_rerun_equals_undisturbed(pool, undisturbed, tmp_path, world_size):
    with pytest.raises(AssertionError, match="worker died"):
        pool.run(kill_worker, tmp_path, supernet(), 5, world_size=world_size)
    got = pool.run(train_case, tmp_path, supernet(), prepare=False, world_size=world_size)
    if world_size == 1:
        assert_equal(got[0], undisturbed["supernet"])
    else:
        assert_close(got[0], undisturbed["supernet"])
        assert [row["step"] for row in got[0][2]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("files", [0, 1])
def test_kill_while_saving_goes_back_to_the_checkpoint_before(pool, undisturbed, tmp_path, files):
    with pytest.raises(AssertionError, match="worker died"):
        pool.run(kill_while_saving, tmp_path, {}, files, world_size=1)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.glob("step-*")] == ["step-00000002"]
    assert_equal(pool.run(train_case, tmp_path, {}, prepare=False, world_size=1)[0], undisturbed["distill"])
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.fixture
def stopped(single_rank, tmp_path) -> TrainJob:
    """A job with checkpoints after steps 2, 4 and 5."""
    interrupted(tmp_path, {}, step=5)
    return job(tmp_path)


def newest(case: TrainJob) -> Path:
    return sorted((case.out / "checkpoints").glob("step-*"))[-1]


def test_truncated_checkpoint_is_passed_over(stopped, undisturbed, caplog):
    victim = next((newest(stopped) / "state").glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    result = run_job(stopped)
    assert "step-00000005 is not usable" in caplog.text and "truncated" in caplog.text
    assert result.final_losses == undisturbed["distill"][0]


def test_only_truncated_checkpoints_are_an_error(stopped):
    for directory in (stopped.out / "checkpoints").glob("step-*"):
        (directory / "model" / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"no usable checkpoint.*metadata\.json is missing"):
        run_job(stopped)


def test_checkpoint_of_another_configuration_is_refused(stopped):
    other = replace(stopped, training=stopped.training.replace(loss=LossConfig(kl=1.0)))
    with pytest.raises(UserError, match="belongs to another configuration"):
        run_job(other)


@pytest.mark.parametrize("failing", ["model", "state"])
def test_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(stopped, undisturbed, monkeypatch, failing):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write = filesystem_async._write_item

    @functools.wraps(write)
    def full(*args, **kwargs):
        stream = next(arg for arg in args if hasattr(arg, "fileno"))
        if failing in Path(stream.name).parent.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem_async, "_write_item", full)
        with pytest.raises(UserError, match="No space left on device.*step-00000005 is intact") as raised:
            run_job(stopped)
    assert "\n" not in str(raised.value)
    assert sorted(p.name for p in newest(stopped).parent.iterdir()) == ["step-00000004", "step-00000005"]
    assert run_job(stopped).final_losses == undisturbed["distill"][0]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_training(single_rank, tmp_path, monkeypatch, caplog):
    """As on NFS: the directory of a file that somebody has open stays, and goes with a later checkpoint."""
    case = job(tmp_path, training={"checkpoint_interval": 1, "steps": 5})
    write_models(case)
    real, refused = os.rmdir, []

    def busy(path, **options):
        if not refused and "step-00000001" in os.readlink(f"/proc/self/fd/{options['dir_fd']}"):
            refused.append(path)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        return real(path, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    result = run_job(case)
    assert result.steps == 5 and refused
    assert "step-00000001 could not be deleted" in caplog.text
    assert sorted(path.name for path in newest(case).parent.iterdir()) == ["step-00000004", "step-00000005"]


def poisoned(step: int):
    """A logit loss that is not a number in one step of four micro-batches."""
    from megatron_jet.training import distill

    real, calls = distill.logit_losses, []

    def losses(*args):
        calls.append(1)
        loss, sums = real(*args)
        if step * 4 < len(calls) <= step * 4 + 4:
            return loss * float("nan"), sums * float("nan")
        return loss, sums

    return losses


def test_non_finite_step_is_skipped(single_rank, tmp_path, monkeypatch):
    case = job(tmp_path, training={"nan_limit": 1, "checkpoint_interval": 0})
    write_models(case)
    monkeypatch.setattr("megatron_jet.training.distill.logit_losses", poisoned(2))
    result = run_job(case)
    losses = [row["loss"] for row in rows(case.out)]
    assert [loss is None for loss in losses] == [False, False, True, False, False, False]
    assert all(value.isfinite().all() for value in weights(result, case).values())


def test_too_many_non_finite_steps_fail_with_step_and_term(single_rank, tmp_path, monkeypatch):
    case = job(tmp_path, training={"nan_limit": 0})
    write_models(case)
    monkeypatch.setattr("megatron_jet.training.distill.logit_losses", poisoned(2))
    with pytest.raises(UserError, match="step 3: kl is nan.*nan_limit=0"):
        run_job(case)


def test_validation_and_best_checkpoint(single_rank, tmp_path):
    case = job(tmp_path, training={"validation_interval": 2, "validation_batches": 2, "keep_best": True, "steps": 5})
    write_models(case)
    result = run_job(case)
    assert [entry["step"] for entry in result.validation] == [2, 4]
    best = min(result.validation, key=lambda entry: entry["loss"])
    assert result.best_checkpoint.name == f"best-{best['step']:08d}"
    names = sorted(p.name for p in (case.out / "checkpoints").iterdir())
    assert names == [result.best_checkpoint.name, "step-00000004", "step-00000005"]
    assert [row["split"] for row in rows(case.out)].count("validation") == 2
    assert list((case.out / "tensorboard").glob("events*"))
    again = run_job(case)
    assert again == result  # a finished job is not repeated


def test_a_worse_validation_does_not_replace_the_best(single_rank, tmp_path, monkeypatch):
    """The validation losses are made to go down and up again."""
    from megatron_jet.training.trainer import Trainer

    case = job(tmp_path, training={"validation_interval": 2, "validation_batches": 1, "keep_best": True})
    write_models(case)
    real, offsets = Trainer._losses, iter([2.0, 1.0, 3.0])

    def losses(self, terms):
        found = real(self, terms)
        return found if torch.is_grad_enabled() else {**found, "loss": next(offsets)}

    monkeypatch.setattr(Trainer, "_losses", losses)
    result = run_job(case)
    assert [entry["loss"] for entry in result.validation] == [2.0, 1.0, 3.0]
    assert result.best_checkpoint.name == "best-00000004"


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "split": "train"}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo'
    )
    log = MetricsLog(tmp_path, 3, tensorboard=False)
    log.write({"step": 4, "split": "train", "loss": float("nan")})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][-2:] == [
        {"step": 3, "split": "train"},
        {"step": 4, "split": "train", "loss": None},
    ]


def test_jobs_that_do_not_fit_together_are_refused(single_rank, tmp_path):
    with pytest.raises(UserError, match="need a teacher"):
        run_job(job(tmp_path, teacher=None))
    wide = job(tmp_path).teacher.replace(vocab_size=128)
    with pytest.raises(UserError, match="vocab_size is 128 in the teacher"):
        run_job(job(tmp_path, teacher=wide))
    with pytest.raises(UserError, match="global_batch_size"):
        run_job(job(tmp_path, training={"micro_batch_size": 3}))
