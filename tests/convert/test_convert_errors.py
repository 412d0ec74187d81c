"""tools/convert.py and bad input: one clear line that names the thing, exit code 1, and nothing half-written."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.convert_cases import (
    check_one_line,
    convert,
    copy_oracle,
    edit_config,
    edit_tensors,
    into_shards,
    rewrite,
    same,
)
from megatron_jet.configs.errors import UserError
from megatron_jet.convert.hf_files import INDEX
from megatron_jet.convert.hf_import import finite

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
    "layer types as a number": (lambda d: edit_config(d, lambda c: c.update(layer_types="4")), ["layer_types '4'"]),
    "layer types as numbers": (lambda d: edit_config(d, lambda c: c.update(layer_types="[4]")), ["layer_types '[4]'"]),
    "window as text": (
        lambda d: edit_config(d, lambda c: c["efficient_attention_config"]["swa"].update(window_size="16")),
        ["efficient_attention_config.swa.window_size='16'"],
    ),
    "no windows": (lambda d: edit_config(d, lambda c: c.update(windows=[])), ["windows has 0 entries"]),
    "odd heads": (lambda d: edit_config(d, lambda c: c.update(head_dim=15)), ["head_dim=15 is not even"]),
    "missing shard": (
        lambda d: (
            (d / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}})),
            (d / "model.safetensors").unlink(),
        ),
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


UNFINISHED = {
    "gptq": (
        {"model.layers.0.mlp.up_proj.qweight": torch.int32, "model.layers.0.mlp.up_proj.scales": torch.half},
        "quan",
    ),
    "fp8": ({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.float32}, "weights are quantised; dequantise"),
    "bnb": ({"model.layers.0.mlp.up_proj.weight.absmax": torch.float32}, "weights are quantised; dequantise"),
    "adapter": (
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.float32},
        "merge it into the model",
    ),
    "wrapped": ({"module.model.norm.weight": torch.float32}, "save the model inside the wrapper"),
    "compiled": ({"_orig_mod.model.norm.weight": torch.float32}, "save the model inside the wrapper"),
    "bare": ({"embed_tokens.weight": torch.float32}, "bare base model"),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_what_a_file_is_that_is_no_plain_model(case, oracle, tmp_path, capsys):
    """The tensors' names tell, where config.json does not."""
    extra, words = UNFINISHED[case]
    edit_tensors(oracle, lambda t: t.update({name: torch.ones(2, dtype=dtype) for name, dtype in extra.items()}))
    assert convert("import", oracle, tmp_path / "ckpt") == 1
    check_one_line(capsys, ["not part of the model", words])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_a_quantised_type_are_named(dtype, oracle, tmp_path, capsys):
    edit_tensors(oracle, lambda t: t.update({NAN_NAME: t[NAN_NAME].to(dtype)}))
    assert convert("import", oracle, tmp_path / "ckpt") == 1
    check_one_line(capsys, [NAN_NAME, "Dequantise them first"])


def test_a_tied_embedding_may_go_by_the_heads_name(oracle, tmp_path, capsys):
    """Savers that drop tensors with shared memory keep either name."""
    edit_tensors(oracle, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    assert convert("import", copy_oracle(tmp_path / "usual"), tmp_path / "usual-ckpt") == 0
    for name in ("ckpt", "usual-ckpt"):
        assert convert("export", tmp_path / name, tmp_path / f"{name}-hf") == 0
    assert same(tmp_path / "ckpt-hf", tmp_path / "usual-ckpt-hf")
    assert convert("verify", oracle, tmp_path / "ckpt") == 0
    edit_config(oracle, lambda config: config.update(tie_word_embeddings=False))
    capsys.readouterr()
    assert convert("import", oracle, tmp_path / "untied") == 1
    check_one_line(capsys, ["missing: model.embed_tokens.weight"])


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf", "x"])
def test_a_tolerance_that_decides_nothing_is_wrong_usage(tolerance, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        convert("verify", tmp_path, tmp_path, f"--tolerance={tolerance}")
    assert caught.value.code == 2 and "--tolerance" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [4, 100, 50_000])
def test_truncated_safetensors(kept, oracle, tmp_path, capsys):
    path = oracle / "model.safetensors"
    assert path.stat().st_size > kept
    with open(path, "r+b") as file:
        file.truncate(kept)
    assert convert("import", oracle, tmp_path / "ckpt") == 1
    check_one_line(capsys, ["model.safetensors", "truncated"])
    assert not (tmp_path / "ckpt").exists()


# Shards with an index: what is done to them, and what the message must name.

NORM = "model.norm.weight"


def edit_index(directory: Path, edit) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def holder(directory: Path, name: str) -> Path:
    """The shard with a tensor."""
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def other(directory: Path, name: str) -> Path:
    """A shard without it."""
    return next(path for path in sorted(directory.glob("*.safetensors")) if path != holder(directory, name))


def edit_shard(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def name_twice(path: Path) -> None:
    """The header says the same of its first tensor once more."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")
    text = (json.dumps(header)[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}").encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def shorten(path: Path, kept: float) -> None:
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * kept))


BAD_SHARDS = {
    "truncated by a little": (lambda d: shorten(holder(d, NORM), 0.999), ["truncated", ".safetensors"]),
    "truncated by half": (lambda d: shorten(holder(d, NORM), 0.5), ["truncated", ".safetensors"]),
    "empty": (lambda d: shorten(holder(d, NORM), 0), ["truncated", "(0 bytes)"]),
    "no safetensors": (lambda d: holder(d, NORM).write_bytes(b"\x08\0\0\0\0\0\0\0not json" * 9), ["unreadable"]),
    "absent": (lambda d: holder(d, NORM).unlink(), ["no such file", INDEX]),
    "wrong index": (lambda d: edit_index(d, lambda w: w.update({NORM: other(d, NORM).name})), [INDEX, NORM]),
    "index without a tensor": (lambda d: edit_index(d, lambda w: w.pop(NORM)), [INDEX, NORM, "not listed"]),
    "index outside": (lambda d: edit_index(d, lambda w: w.update({NORM: "../config.json"})), ["no such file"]),
    "index with a number": (lambda d: edit_index(d, lambda w: w.update({NORM: 3})), [INDEX, "weight_map"]),
    "no weight_map": (lambda d: (d / INDEX).write_text("[]"), [INDEX, "weight_map"]),
    "broken index": (lambda d: (d / INDEX).write_text('{"weight_map": {'), [INDEX, "JSON"]),
    "duplicate in two shards": (
        lambda d: edit_shard(other(d, NORM), lambda t: t.update({NORM: torch.zeros(64)})),
        [f"tensor '{NORM}'", "as well"],
    ),
    "a single file beside the index": (
        lambda d: shutil.copyfile(holder(d, NORM), d / "model.safetensors"),
        ["has model.safetensors and an", INDEX, "remove"],
    ),
    "duplicate in one header": (lambda d: name_twice(holder(d, NORM)), ["is there twice"]),
    "shape off by one": (
        lambda d: edit_shard(holder(d, NORM), lambda t: t.update({NORM: torch.ones(65)})),
        [NORM, "[65]", "[64]"],
    ),
    "transposed": (
        lambda d: edit_shard(holder(d, NAN_NAME), lambda t: t.update({NAN_NAME: t[NAN_NAME].t().contiguous()})),
        [NAN_NAME, "[64, 128]", "[128, 64]"],
    ),
    "nan": (
        lambda d: edit_shard(holder(d, NAN_NAME), lambda t: t[NAN_NAME].view(-1)[-1:].fill_(float("nan"))),
        [NAN_NAME, "NaN"],
    ),
    "tensor missing everywhere": (
        lambda d: (
            edit_shard(holder(d, NORM), lambda t: t.pop(NORM)),
            edit_index(d, lambda w: w.pop(NORM)),
        ),
        ["missing", NORM],
    ),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards_are_one_line_and_leave_nothing(case, oracle, tmp_path, capsys):
    damage, named = BAD_SHARDS[case]
    into_shards(oracle)
    damage(oracle)
    out = tmp_path / "out" / "ckpt"
    assert convert("import", oracle, out) == 1
    check_one_line(capsys, [str(oracle), *named])
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_shards_without_damage_are_read(oracle, tmp_path):
    into_shards(oracle)
    assert convert("import", oracle, tmp_path / "ckpt") == 0


@pytest.mark.parametrize(
    "path",
    [
        ("model_type",),
        ("hidden_size",),
        ("intermediate_size",),
        ("num_hidden_layers",),
        ("num_attention_heads",),
        ("vocab_size",),
        ("layer_types",),
        ("efficient_attention_config",),
        ("efficient_attention_config", "jet"),
        ("efficient_attention_config", "jet", "num_heads"),
        ("efficient_attention_config", "jet", "head_dim"),
        ("efficient_attention_config", "swa"),
        ("efficient_attention_config", "swa", "window_size"),
    ],
    ids=".".join,
)
def test_a_missing_config_field_is_named(path, oracle, tmp_path, capsys):
    def remove(config: dict) -> None:
        for key in path[:-1]:
            config = config[key]
        config.pop(path[-1])

    edit_config(oracle, remove)
    assert convert("import", oracle, tmp_path / "ckpt") == 1
    check_one_line(capsys, [str(oracle / "config.json"), path[-1]])
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_anywhere_is_found(dtype, value):
    tensor = torch.randn(7, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert finite(tensor, "t", "f") is tensor
    for place in range(tensor.numel()):
        spoiled = tensor.clone()
        spoiled.view(-1)[place] = value
        with pytest.raises(UserError, match="f: tensor 't' holds NaN or infinite"):
            finite(spoiled, "t", "f")


# Bad input to export


@pytest.fixture
def checkpoint(oracle, tmp_path) -> Path:
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    return tmp_path / "ckpt"


def test_a_folder_without_a_tokenizer_is_none(checkpoint, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert convert("export", checkpoint, tmp_path / "out", "--tokenizer", tmp_path / "empty") == 1
    check_one_line(capsys, ["empty", "no tokenizer"])
    assert not (tmp_path / "out").exists()


KEY = "decoder.layers.1.self_attention.linear_qkv.weight"
BAD_EXPORTS = {
    "unfinished": (lambda c: (c / "metadata.json").unlink(), ["not a complete Megatron checkpoint"]),
    "no model config": (lambda c: (c / "model_config.json").unlink(), ["model_config.json is missing"]),
    "no directory": (shutil.rmtree, ["no such checkpoint directory"]),
    "missing": (lambda c: rewrite(c, lambda t: t.pop(KEY)), ["missing", KEY]),
    "extra": (lambda c: rewrite(c, lambda t: t.update(x=torch.ones(1))), ["not part of the model", "x"]),
    "shape": (lambda c: rewrite(c, lambda t: t.update({KEY: t[KEY][:-1]})), [KEY, "[127, 64]", "[128, 64]"]),
    "nan": (lambda c: rewrite(c, lambda t: t[KEY][0].fill_(float("nan"))), [KEY, "NaN"]),
    "truncated": (lambda c: shorten(c / "__0_0.distcp", 0.9), ["damaged"]),
    "no data": (lambda c: (c / "__0_0.distcp").unlink(), ["damaged"]),
    "no metadata": (lambda c: (c / ".metadata").unlink(), ["not a complete Megatron checkpoint"]),
    "broken metadata": (lambda c: (c / ".metadata").write_bytes(b"x" * 1000), ["metadata cannot be read"]),
    "broken config": (lambda c: (c / "model_config.json").write_text("{"), ["model_config.json", "JSON"]),
    "config as a list": (lambda c: (c / "model_config.json").write_text("[]"), ["model_config.json", "no mapping"]),
    "config field": (
        lambda c: (c / "model_config.json").write_text(
            json.dumps({k: v for k, v in json.loads((c / "model_config.json").read_text()).items() if k != "head_dim"})
        ),
        ["model_config.json", "head_dim"],
    ),
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
