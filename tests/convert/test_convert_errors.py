"""tools/convert.py and bad input: one clear line that names the thing, exit code 1, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from convert.convert_cases import check_one_line, convert, copy_oracle, edit_config, edit_tensors, rewrite
from megatron_jet.convert.hf_files import INDEX

NAN_NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def oracle(tmp_path) -> Path:
    return copy_oracle(tmp_path / "hf")


# Bad input to import: what is done to a good model, and what the message must name.

BAD_IMPORTS = {
    "missing": (lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")), ["missing", "model.norm.weight"]),
    "extra": (lambda d: edit_tensors(d, lambda t: t.update(x=torch.ones(2))), ["not part of the model", "x"]),
    "shape": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.norm.weight": torch.ones(63)})),
        ["model.norm.weight", "[63]", "[64]"],
    ),
    "nan": (
        lambda d: edit_tensors(d, lambda t: t[NAN_NAME].view(-1)[5:6].fill_(float("nan"))),
        [NAN_NAME, "NaN"],
    ),
    "infinite": (lambda d: edit_tensors(d, lambda t: t[NAN_NAME].view(-1)[5:6].fill_(float("inf"))), [NAN_NAME]),
    "integer": (
        lambda d: edit_tensors(d, lambda t: t.update({NAN_NAME: t[NAN_NAME].to(torch.int8)})),
        [NAN_NAME, "I8"],
    ),
    "mixed types": (
        lambda d: edit_tensors(d, lambda t: t.update({NAN_NAME: t[NAN_NAME].bfloat16()})),
        [NAN_NAME, "different types"],
    ),
    "model type": (lambda d: edit_config(d, lambda c: c.update(model_type="mamba")), ["model_type 'mamba'", "qwen2"]),
    "config field": (lambda d: edit_config(d, lambda c: c.pop("hidden_size")), ["hidden_size is missing"]),
    "layer types": (lambda d: edit_config(d, lambda c: c["layer_types"].pop()), ["3 entries", "4 layers"]),
    "no config": (lambda d: (d / "config.json").unlink(), ["config.json: no such file"]),
    "broken config": (lambda d: (d / "config.json").write_text("{"), ["config.json", "JSON"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["no model.safetensors"]),
    "no directory": (shutil.rmtree, ["no such directory"]),
    "missing shard": (
        lambda d: (d / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}})),
        ["model-1.safetensors: no such file"],
    ),
    "wrong index": (
        lambda d: (d / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}})),
        ["tensor 'a' is not in model.safetensors"],
    ),
}


@pytest.mark.parametrize("case", BAD_IMPORTS)
def test_bad_import_is_one_line_and_leaves_nothing(case, oracle, tmp_path, capsys):
    damage, named = BAD_IMPORTS[case]
    damage(oracle)
    out = tmp_path / "out" / "ckpt"
    assert convert("import", oracle, out) == 1
    check_one_line(capsys, named)
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize("kept", [4, 100, 50_000])
def test_truncated_safetensors(kept, oracle, tmp_path, capsys):
    path = oracle / "model.safetensors"
    assert path.stat().st_size > kept
    with open(path, "r+b") as file:
        file.truncate(kept)
    assert convert("import", oracle, tmp_path / "ckpt") == 1
    check_one_line(capsys, ["model.safetensors", "truncated"])
    assert not (tmp_path / "ckpt").exists()


# Bad input to export


@pytest.fixture
def checkpoint(oracle, tmp_path) -> Path:
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    return tmp_path / "ckpt"


KEY = "decoder.layers.1.self_attention.linear_qkv.weight"
BAD_EXPORTS = {
    "unfinished": (lambda c: (c / "metadata.json").unlink(), ["not a complete Megatron checkpoint"]),
    "no model config": (lambda c: (c / "model_config.json").unlink(), ["model_config.json is missing"]),
    "no directory": (shutil.rmtree, ["no such checkpoint directory"]),
    "missing": (lambda c: rewrite(c, lambda t: t.pop(KEY)), ["missing", KEY]),
    "extra": (lambda c: rewrite(c, lambda t: t.update(x=torch.ones(1))), ["not part of the model", "x"]),
    "shape": (lambda c: rewrite(c, lambda t: t.update({KEY: t[KEY][:-1]})), [KEY, "[127, 64]", "[128, 64]"]),
    "nan": (lambda c: rewrite(c, lambda t: t[KEY][0].fill_(float("nan"))), [KEY, "NaN"]),
    "damaged": (lambda c: (c / "__0_0.distcp").write_bytes(b"x" * 1000), ["damaged"]),
}


@pytest.mark.parametrize("case", BAD_EXPORTS)
def test_bad_export_is_one_line_and_leaves_nothing(case, checkpoint, tmp_path, capsys):
    damage, named = BAD_EXPORTS[case]
    damage(checkpoint)
    capsys.readouterr()
    out = tmp_path / "out" / "hf"
    assert convert("export", checkpoint, out) == 1
    check_one_line(capsys, named)
    assert not out.parent.exists() or not list(out.parent.iterdir())
