"""`convert.py verify`: equal models pass at any layout, and a wrong layer is named."""

import operator
import shutil
import subprocess
import sys

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException
from transformers import Qwen2ForCausalLM

from convert.convert_cases import SCRIPT, check_one_line, convert, save_qwen2
from convert.hf_cases import ORACLE
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint, write_checkpoint
from megatron_jet.convert.hf_export import checkpoint_config
from megatron_jet.convert.hf_import import import_hf
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.convert.verify import compare
from megatron_jet.convert.verify.compare import check_same_model, first_different, run_megatron, verify
from megatron_jet.convert.verify.worker import VerifyJob, write_activations

TOLERANCE = 1e-5  # fp32 round-off over four layers, measured at about 1e-6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "ckpt"
    import_hf(ORACLE, path)
    return path


def test_equal_models(checkpoint):
    rows = verify(ORACLE, checkpoint, ParallelConfig())
    assert [row.name for row in rows] == [
        "embedding",
        "layer 0 (jet)",
        "layer 1 (swa:16)",
        "layer 2 (attn)",
        "layer 3 (jet)",
        "logits",
    ]
    assert first_different(rows, TOLERANCE) is None
    assert rows[0].ratio == rows[0].largest == 0, "the same bits"
    assert all(0 < row.ratio < TOLERANCE for row in rows[1:]), "exactly 0 would mean one model ran twice"


def test_equal_models_over_four_processes(checkpoint, pool, monkeypatch):
    """The pool's workers stand in for the processes that the command starts."""
    layout = ParallelConfig(tensor=2, pipeline=2)
    monkeypatch.setattr(
        "megatron_jet.convert.verify.compare.run_megatron", lambda job: pool.run(write_activations, job, layout=layout)
    )
    rows = verify(ORACLE, checkpoint, layout)
    assert len(rows) == 6 and first_different(rows, TOLERANCE) is None


@pytest.mark.slow
def test_the_command_starts_its_processes(checkpoint):
    rows = verify(ORACLE, checkpoint, ParallelConfig(tensor=2))
    assert len(rows) == 6 and first_different(rows, TOLERANCE) is None


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("decoder.layers.2.self_attention.linear_proj.weight", "layer 2 (attn)"),
        ("decoder.layers.3.self_attention.dt_bias", "layer 3 (jet)"),
        ("decoder.final_layernorm.weight", "logits"),
        ("embedding.word_embeddings.weight", "embedding"),
    ],
)
def test_the_first_wrong_layer_is_named(checkpoint, tmp_path, key, first):
    source = GlobalCheckpoint(checkpoint)
    tensors = {name: source.read(name) for name in source}
    tensors[key] = tensors[key] * 1.01
    write_checkpoint(tmp_path / "wrong", tensors, checkpoint_config(checkpoint).to_dict())
    assert first_different(verify(ORACLE, tmp_path / "wrong", ParallelConfig()), 1e-4).name == first


@pytest.mark.parametrize("value", [0.0, 1e-3, torch.nan])
def test_a_wrong_row_of_the_embedding_is_found_whichever_tokens_are_drawn(checkpoint, tmp_path, value):
    source = GlobalCheckpoint(checkpoint)
    tensors = {name: source.read(name) for name in source}
    embedding = tensors["embedding.word_embeddings.weight"]
    for row in (0, len(embedding) // 2, len(embedding) - 1):
        tensors["embedding.word_embeddings.weight"] = embedding.clone()
        tensors["embedding.word_embeddings.weight"][row] = value
        write_checkpoint(tmp_path / "wrong", tensors, checkpoint_config(checkpoint).to_dict())
        assert first_different(verify(ORACLE, tmp_path / "wrong", ParallelConfig()), 1e-4).name == "embedding"


def test_a_config_that_transformers_reads_in_another_way_is_named(tmp_path):
    """Windows are longer than the tokens compared, so that outputs would not tell."""
    save_qwen2(tmp_path)
    loaded = load_for_causal_lm(tmp_path).config.to_dict()
    compare.check_as_loaded(tmp_path, loaded)
    windows = loaded | {"use_sliding_window": True, "sliding_window": 512, "layer_types": ["sliding_attention"] * 2}
    for wrong in (windows, loaded | {"rms_norm_eps": 1e-5}):
        with pytest.raises(UserError, match=r"config\.json: transformers loads (layer_plan|rms_norm_eps) as"):
            compare.check_as_loaded(tmp_path, wrong)


@pytest.mark.parametrize("error", [KeyError("sliding_attention"), TypeError("two\nlines"), AttributeError()])
def test_a_model_that_transformers_cannot_run_is_one_line(tmp_path, monkeypatch, capsys, error):
    save_qwen2(tmp_path / "hf", dtype=torch.float32)
    assert convert("import", tmp_path / "hf", tmp_path / "ckpt") == 0
    capsys.readouterr()

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", fail)
    assert convert("verify", tmp_path / "hf", tmp_path / "ckpt") == 1
    check_one_line(capsys, [str(tmp_path / "hf"), "transformers cannot run this model"])


def test_nan_counts_as_different(checkpoint, tmp_path):
    source = GlobalCheckpoint(checkpoint)
    tensors = {name: source.read(name) for name in source}
    tensors["decoder.layers.1.mlp.linear_fc2.weight"][0, 0] = torch.nan
    write_checkpoint(tmp_path / "wrong", tensors, checkpoint_config(checkpoint).to_dict())
    assert first_different(verify(ORACLE, tmp_path / "wrong", ParallelConfig()), 1e-4).name == "layer 1 (swa:16)"


def test_heads_that_do_not_divide_are_an_error_before_anything_runs(checkpoint):
    with pytest.raises(UserError, match="do not divide by tensor_parallel=3"):
        verify(ORACLE, checkpoint, ParallelConfig(tensor=3))


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 200), ("hidden_size", 32), ("num_hidden_layers", 3)])
def test_models_of_other_sizes_are_an_error_before_anything_runs(checkpoint, tmp_path, key, value):
    config = read_json(ORACLE / "config.json")
    config |= {key: value, "layer_types": config["layer_types"][: value if key == "num_hidden_layers" else None]}
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=f"is {value}, in the checkpoint .*different models"):
        verify(tmp_path, checkpoint, ParallelConfig())


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c["efficient_attention_config"]["swa"].update(window_size=128), "layer 1 is swa:128, .* swa:16"),
        (lambda c: c.update(layer_types=["jet", "attn", "attn", "jet"]), "layer 1 is attn, in the checkpoint swa:16"),
        (
            lambda c: c["efficient_attention_config"]["jet"].update(norm_eps="1e-6"),
            r"layer 0 \(jet\): norm_eps is 1e-06",
        ),
        (lambda c: c.update(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05"),
        (lambda c: c.update(max_position_embeddings=64), "max_position_embeddings is 64"),
        (lambda c: c.update(rope_theta=5e5), "rope_theta is 500000.0"),
        (lambda c: c.update(tie_word_embeddings=not c["tie_word_embeddings"]), "tie_word_embeddings is"),
        (lambda c: c.update(num_key_value_heads=c["num_attention_heads"]), "num_key_value_heads is"),
    ],
)
def test_configs_of_other_models_are_an_error_before_anything_runs(checkpoint, tmp_path, monkeypatch, edit, named):
    monkeypatch.setattr("megatron_jet.convert.verify.compare.hf_activations", None)
    config = read_json(ORACLE / "config.json")
    edit(config)
    write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match=f"{named}.*these are different models"):
        verify(tmp_path, checkpoint, ParallelConfig())


def test_token_ids_and_the_spread_of_new_weights_are_no_difference(checkpoint, tmp_path):
    config = read_json(ORACLE / "config.json")
    write_json(tmp_path / "config.json", config | {"eos_token_id": 3, "initializer_range": 0.5})
    check_same_model(tmp_path, checkpoint_config(checkpoint))


def test_a_process_that_fails_is_one_line(checkpoint, monkeypatch):
    """It raises: `getitem` of a rank and a job is a TypeError. Or it dies."""
    job = VerifyJob(str(checkpoint), checkpoint_config(checkpoint), ParallelConfig(tensor=2), torch.zeros(1), "")
    monkeypatch.setattr("megatron_jet.convert.verify.worker.run", operator.getitem)
    with pytest.raises(UserError, match="ckpt: the Megatron model failed: TypeError: ") as caught:
        run_megatron(job)
    assert "\n" not in str(caught.value)

    def dies(*args, **options):
        raise ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 2, -9, "SIGKILL")

    monkeypatch.setattr("torch.multiprocessing.spawn", dies)
    with pytest.raises(UserError, match="ckpt: the Megatron model failed: process 1 terminated with signal SIGKILL"):
        run_megatron(job)


@pytest.mark.slow
def test_a_damaged_checkpoint_over_two_processes_is_one_line(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bad")
    with open(tmp_path / "bad" / "__0_0.distcp", "r+b") as file:
        file.truncate(5000)
    command = [sys.executable, str(SCRIPT), "verify", str(ORACLE), str(tmp_path / "bad"), "--tp", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {tmp_path / 'bad'}: __0_0.distcp is not what was written")
    assert "the checkpoint is damaged" in run.stderr and run.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--tp", "--pp"])
def test_a_layout_of_no_processes_is_one_line(checkpoint, capsys, option):
    assert convert("verify", ORACLE, checkpoint, option, "0") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --tp, --pp: ") and error.count("\n") == 1 and "greater than or equal to 1" in error
