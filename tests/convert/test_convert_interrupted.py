"""tools/convert.py: existing outputs, a kill at any moment, a disk that fills up."""

import resource
from pathlib import Path

import pytest
import torch

from convert.convert_cases import check_one_line, convert, copy_oracle, edit_tensors
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint

NAN_NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def oracle(tmp_path) -> Path:
    return copy_oracle(tmp_path / "hf")


def test_existing_output_needs_force_and_survives_a_failure(oracle, tmp_path, capsys):
    out = tmp_path / "ckpt"
    assert convert("import", oracle, out) == 0
    capsys.readouterr()
    assert convert("import", oracle, out) == 1
    check_one_line(capsys, [str(out), "exists", "--force"])
    edit_tensors(oracle, lambda t: t[NAN_NAME].fill_(float("nan")))
    assert convert("import", oracle, out, "--force") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "hf"], "no temporary directory may stay"
    assert torch.isfinite(GlobalCheckpoint(out).read("decoder.layers.2.mlp.linear_fc1.weight")).all()
    edit_tensors(oracle, lambda t: t[NAN_NAME].fill_(0.25))
    assert convert("import", oracle, out, "--force") == 0
    assert (GlobalCheckpoint(out).read("decoder.layers.2.mlp.linear_fc1.weight")[128:] == 0.25).all()


def test_full_disk_is_one_line_and_leaves_nothing(oracle, tmp_path, capsys):
    """A limit on the size of files stands in for a full disk: the write fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        code = convert("import", oracle, tmp_path / "ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    check_one_line(capsys, ["ckpt", "cannot be written"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
