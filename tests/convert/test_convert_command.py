"""tools/convert.py: round trips bit by bit, what goes along with the weights, and the command line."""

import json

import pytest
import torch

from convert.convert_cases import convert, copy_oracle, edit_tensors, same, save_qwen2, tensors_of
from convert.hf_cases import ORACLE, config_dict, random_model
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
from megatron_jet.convert.hf_files import INDEX


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


def test_files_of_other_systems_come_back_byte_by_byte(tmp_path):
    """Line ends of Windows, and a card in Latin-1: what is not ours is not read as text."""
    source = copy_oracle(tmp_path / "hf")
    assert convert("import", source, tmp_path / "first") == 0
    assert convert("export", tmp_path / "first", tmp_path / "ours") == 0
    config = (tmp_path / "ours" / "config.json").read_bytes().replace(b"\n", b"\r\n")  # with our own auto_map
    card = "# Mod\xe8le\r\n".encode("latin-1")
    (source / "config.json").write_bytes(config)
    (source / "README.md").write_bytes(card)
    assert convert("import", source, tmp_path / "ckpt") == convert("export", tmp_path / "ckpt", tmp_path / "back") == 0
    assert (tmp_path / "back" / "config.json").read_bytes() == config
    assert (tmp_path / "back" / "README.md").read_bytes() == card


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


def test_usage_errors_exit_2_and_help_has_examples(capsys):
    for arguments in ([], ["import"], ["export", "a", "b", "--dtype", "fp8"]):
        with pytest.raises(SystemExit) as error:
            convert(*arguments)
        assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        convert("verify", "--help")
    assert error.value.code == 0 and "python tools/convert.py verify" in capsys.readouterr().out
