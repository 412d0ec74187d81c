"""Model checkpoints: atomic, complete or refused, errors that name what is wrong."""

import errno
import os
import shutil

import pytest
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.model.builder import build_model
from megatron_jet.model.state import gather_tensors, load_tensors
from megatron_jet.training import checkpoint
from megatron_jet.training.checkpoint import load_model, save_model
from mixers.mixer_cases import model_with


@pytest.fixture
def chunks(single_rank):
    return build_model(model_with("jet", "attn"), single_rank)


def test_save_and_load_in_another_dtype(single_rank, chunks, tmp_path):
    save_model(chunks, tmp_path / "a" / "model", model_config={"hidden_size": 32})
    assert read_json(tmp_path / "a" / "model" / "model_config.json")["hidden_size"] == 32
    other = build_model(model_with("jet", "attn"), single_rank, dtype="bf16", init_seed=5)
    load_model(other, tmp_path / "a" / "model")
    saved = gather_tensors(chunks)
    for key, tensor in gather_tensors(other).items():
        assert torch.equal(tensor, saved[key].to(tensor.dtype)), key
    assert os.listdir(tmp_path / "a") == ["model"]


def test_saving_again_replaces(single_rank, chunks, tmp_path):
    save_model(chunks, tmp_path / "model")
    newer = build_model(model_with("jet", "attn"), single_rank, init_seed=9)
    save_model(newer, tmp_path / "model")
    load_model(chunks, tmp_path / "model")
    assert all(torch.equal(t, gather_tensors(newer)[key]) for key, t in gather_tensors(chunks).items())
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_save_leaves_the_old_checkpoint(chunks, tmp_path, monkeypatch):
    save_model(chunks, tmp_path / "model")
    before = sorted(os.listdir(tmp_path / "model"))

    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.dist_checkpointing, "save", full_disk)
    with pytest.raises(UserError, match="model: checkpoint cannot be written .*No space left on device"):
        save_model(chunks, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == before and os.listdir(tmp_path) == ["model"]


def test_a_place_that_cannot_be_written(chunks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_model(chunks, tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "no such checkpoint"),
        (lambda path: (path / "metadata.json").unlink(), "not a complete Megatron checkpoint"),
        (lambda path: (path / ".metadata").unlink(), "metadata cannot be read"),
        (lambda path: (path / ".metadata").write_bytes(b"junk"), "metadata cannot be read"),
        (lambda path: next(path.glob("*.distcp")).write_bytes(b"short"), "damaged"),
    ],
    ids=["missing", "unfinished", "no index", "broken index", "truncated"],
)
def test_damaged_checkpoints_are_refused(chunks, tmp_path, damage, message):
    save_model(chunks, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        load_model(chunks, tmp_path / "model")


@pytest.mark.parametrize(
    ("plan", "changes", "message"),
    [
        (("attn", "attn"), {}, r"misses decoder.layers.0.self_attention.linear_proj.weight"),
        (("jet",), {}, r"has more than the model: decoder.layers.1"),
        (("jet", "attn"), {"vocab_size": 66}, r"tensor 'embedding.word_embeddings.weight' has shape \[64, 32\]"),
    ],
)
def test_other_models_are_refused_by_tensor(single_rank, chunks, tmp_path, plan, changes, message):
    save_model(chunks, tmp_path / "model")
    other = build_model(model_with(*plan, **changes), single_rank)
    with pytest.raises(UserError, match=message):
        load_model(other, tmp_path / "model")


def test_partial_load_takes_what_both_have(single_rank, chunks, tmp_path):
    save_model(chunks, tmp_path / "model")
    other = build_model(model_with("attn", "attn"), single_rank, init_seed=3)
    before = gather_tensors(other)
    load_model(other, tmp_path / "model", strict=False)
    saved = gather_tensors(chunks)
    for key, tensor in gather_tensors(other).items():
        assert torch.equal(tensor, saved.get(key, before[key]))


def test_shapes_are_checked_when_tensors_are_given(single_rank, chunks):
    gla = build_model(model_with("gla", "attn"), single_rank)
    with pytest.raises(ValueError, match=r"in_proj.weight.\w+: shape"):
        load_tensors(gla, gather_tensors(chunks), strict=False)


def test_missing_tensors_are_named(chunks):
    tensors = gather_tensors(chunks)
    del tensors["decoder.layers.0.self_attention.A_log"]
    with pytest.raises(KeyError, match="A_log"):
        load_tensors(chunks, tensors)
