"""The worker looks at its environment before the first stage."""

import errno
import os

import pytest
import torch

from jet_kernels import dispatch, fla_backend
from megatron_jet import run_stage
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.recipes.tiny import tiny


@pytest.fixture
def hopper(monkeypatch):
    """A GPU on which this Triton cannot train the gated delta rule."""

    def refuse() -> None:
        raise RuntimeError("the gated delta rule cannot train")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "backend", lambda operation, device: "fla")
    monkeypatch.setattr(fla_backend, "check_triton_for_backward", refuse)


@pytest.mark.parametrize("stage", ["placement", "block_selection", "stage1"])
def test_a_gpu_that_cannot_train_the_run_is_refused_before_the_first_stage(hopper, tmp_path, stage):
    """Also where the stage itself would pass: the paper's placement trains GLA, and the next stage would fail."""
    with pytest.raises(UserError, match="cannot train"):
        run_stage.run_targets(tmp_path, tiny(), [(stage, None)])
    assert not list(tmp_path.iterdir())


def test_stages_that_do_not_train_do_not_mind(hopper):
    run_stage.check_kernels(tiny(), ["prepare", "export", "evaluate", "report"])


def test_no_gpu_no_check():
    run_stage.check_kernels(tiny(), ["stage1"])


@pytest.mark.parametrize(
    "target", ["nostage", "../x", "/tmp/x", "block_selection:../../x", "block_selection:mamba", "a:"]
)
def test_an_unknown_stage_or_candidate_writes_nothing(tmp_path, monkeypatch, capsys, target):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(tiny()))
    monkeypatch.setenv("JET_STAGE_LOGS", "1")
    before = sorted(tmp_path.rglob("*"))
    assert run_stage.main([str(tmp_path / "run"), target]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_file_system_says_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "status.json"))

    (tmp_path / "config.yaml").write_text(dump_yaml(tiny()))
    monkeypatch.setattr(run_stage, "run_targets", full)
    assert run_stage.main([str(tmp_path), "prepare"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/status.json: No space left on device\n"


def test_job_with_gpus_that_torch_does_not_see_never_trains_on_the_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for asked in ("", "0", "1", "x"):
        monkeypatch.setenv("POSTNAS_GPUS", asked)
        run_stage.check_gpus()
    monkeypatch.setenv("POSTNAS_GPUS", "2")
    (tmp_path / "config.yaml").write_text(dump_yaml(tiny()))
    assert run_stage.main([str(tmp_path), "prepare"]) == 1
    err = capsys.readouterr().err
    assert (
        err == f"error: torch {torch.__version__} sees 1 of 2 GPUs: a CPU build, the driver, or CUDA_VISIBLE_DEVICES\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
