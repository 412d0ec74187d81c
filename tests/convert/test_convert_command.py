"""tools/convert.py: round trips bit by bit, and one clear line for every kind of bad input."""

import importlib.util
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from convert.hf_cases import ORACLE, config_dict, random_model
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint, write_checkpoint
from megatron_jet.convert.hf_files import INDEX, HfTensors

SCRIPT = Path(__file__).parents[2] / "tools" / "convert.py"
NAN_NAME = "model.layers.2.mlp.up_proj.weight"


def load_script():
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert(*arguments) -> int:
    return load_script().main([str(argument) for argument in arguments])


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    source = HfTensors(directory)
    return {name: source.read(name) for name in source}


def same(first: Path, second: Path) -> bool:
    a, b = tensors_of(first), tensors_of(second)
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def save_qwen2(directory: Path, dtype=torch.bfloat16, tied: bool = True) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    Qwen2ForCausalLM(config).to(dtype).save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")


@pytest.fixture
def oracle(tmp_path) -> Path:
    """A copy of the published format's tiny model, to be damaged."""
    source = tmp_path / "hf"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(ORACLE / name, source / name)
    return source


def edit_tensors(directory: Path, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, edit) -> None:
    config = json.loads((directory / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_round_trip(tmp_path, dtype, tied):
    save_qwen2(tmp_path / "hf", dtype, tied)
    assert convert("import", tmp_path / "hf", tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "back") == 0
    assert same(tmp_path / "hf", tmp_path / "back")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert not list((tmp_path / "back").glob("*.py")), "a plain model needs no code"


def test_published_format_round_trip(tmp_path):
    assert convert("import", ORACLE, tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "back") == 0
    assert same(ORACLE, tmp_path / "back")
    before, after = (json.loads((path / "config.json").read_text()) for path in (ORACLE, tmp_path / "back"))
    code = after.pop("auto_map")["AutoModelForCausalLM"].partition(".")[0]
    before.pop("auto_map")
    assert after == before and after["efficient_attention_config"]["jet"]["norm_eps"] == "1e-5"
    assert (tmp_path / "back" / f"{code}.py").is_file()


def test_superset_round_trip_with_every_mixer_in_shards(tmp_path):
    model = random_model(config_dict(layer_types=["jet", "swa", "gated_delta_net", "attn", "gla"]), dtype=torch.float32)
    model.config.architectures = ["MegatronJetForCausalLM"]
    model.save_pretrained(tmp_path / "hf")
    assert convert("import", tmp_path / "hf", tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "back", "--shard-bytes", "4000") == 0
    assert (tmp_path / "back" / INDEX).is_file() and len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert same(tmp_path / "hf", tmp_path / "back")
    assert convert("import", tmp_path / "back", tmp_path / "again") == 0
    one, two = GlobalCheckpoint(tmp_path / "ckpt"), GlobalCheckpoint(tmp_path / "again")
    assert list(one) == list(two) and all(torch.equal(one.read(key), two.read(key)) for key in one)


def test_export_in_another_type_keeps_a_log_in_fp32(tmp_path):
    assert convert("import", ORACLE, tmp_path / "ckpt") == 0
    assert convert("export", tmp_path / "ckpt", tmp_path / "bf16", "--dtype", "bf16") == 0
    tensors = tensors_of(tmp_path / "bf16")
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float32} == {
        name for name in tensors if name.endswith("A_log")
    }
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    reference = tensors_of(ORACLE)
    assert all(torch.equal(tensor, reference[name].to(tensor.dtype)) for name, tensor in tensors.items())


def test_tied_head_written_out_is_accepted_when_it_is_the_embedding(tmp_path):
    save_qwen2(tmp_path / "hf")
    edit_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert convert("import", tmp_path / "hf", tmp_path / "ckpt") == 0
    edit_tensors(tmp_path / "hf", lambda t: t["lm_head.weight"].add_(1))
    assert convert("import", tmp_path / "hf", tmp_path / "ckpt2") == 1


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


# Bad input to export


@pytest.fixture
def checkpoint(oracle, tmp_path) -> Path:
    assert convert("import", oracle, tmp_path / "ckpt") == 0
    return tmp_path / "ckpt"


def rewrite(checkpoint: Path, edit) -> None:
    """The checkpoint again with edited tensors."""
    source = GlobalCheckpoint(checkpoint)
    tensors = {key: source.read(key) for key in source}
    edit(tensors)
    config = json.loads((checkpoint / "model_config.json").read_text())
    write_checkpoint(checkpoint, tensors, config)


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


def test_usage_errors_exit_2_and_help_has_examples(capsys):
    for arguments in ([], ["import"], ["export", "a", "b", "--dtype", "fp8"]):
        with pytest.raises(SystemExit) as error:
            convert(*arguments)
        assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        convert("verify", "--help")
    assert error.value.code == 0 and "python tools/convert.py verify" in capsys.readouterr().out


def check_one_line(capsys, named: list[str]) -> None:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for text in named:
        assert text in lines[0], lines[0]
