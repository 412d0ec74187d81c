"""The worker looks at its environment before the first stage."""

import pytest
import torch

from jet_kernels import dispatch, fla_backend
from megatron_jet import run_stage
from megatron_jet.configs.errors import UserError
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
