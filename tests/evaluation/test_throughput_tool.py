"""tools/throughput.py: what it writes, and one clear line for what it cannot do."""

import json
from dataclasses import replace

import pytest
import torch

from evaluation.tools import ROOT, load_tool
from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_json
from megatron_jet.configs.hf_format import model_to_hf
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS
from megatron_jet.evaluation import device as device_module
from megatron_jet.evaluation.throughput import comparison
from megatron_jet.evaluation.throughput.comparison import Protocol, choose_load, default_chunk
from megatron_jet.evaluation.throughput.models import (
    choose_attention,
    display_name,
    open_subject,
    open_subjects,
    random_model,
)
from megatron_jet.evaluation.throughput.result import ThroughputResult
from megatron_jet.evaluation.throughput.roofline import decode_weight_bytes, predicted_cache_bytes

TOOL = load_tool("throughput")
CPU = torch.device("cpu")
TEACHER = str(ROOT / "megatron_jet" / "teachers" / "tiny")
SHAPE = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=40,
    max_position_embeddings=256,
    layer_plan=("jet", "attn"),
    mixers={"jet": JetBlockConfig(num_heads=2, head_dim=6, expand_v=1.5, dconv_generator_reduction=2)},
)
PROTOCOL = Protocol(
    contexts=(16, 24),
    new_tokens=2,
    iterations=3,
    dropped=1,
    batch_size=2,
    max_batch=64,
    prefill_chunk=8,
    dtype="fp32",
    decode="auto",
    memory_limit=None,
)
SPEED = device_module.Rates(bytes_per_second=1e9, flops_per_second=1e10)
HEAD = {"date": "2026-11-21", "command": "python", "device": {"name": "test"}, "versions": {}}


@pytest.fixture
def config_file(tmp_path):
    write_json(tmp_path / "small" / "config.json", model_to_hf(SHAPE))
    return tmp_path / "small" / "config.json"


@pytest.fixture
def quick(monkeypatch):
    """No gigabytes are moved to find out how fast this machine is."""
    monkeypatch.setattr(device_module, "measure_rates", lambda device, dtype: SPEED)


def subjects(config_file, count: int = 2):
    options = {"dtype": "fp32", "attention": "auto", "device": CPU, "longest": 100}
    return open_subjects([str(config_file)] * count, **options)


def test_two_models_in_one_file(tmp_path, config_file, quick, capsys):
    out, picture = tmp_path / "result.json", tmp_path / "figure.svg"
    arguments = ["--random-weights", str(config_file), "--against", TEACHER, "--contexts", "16,8,16"]
    arguments += ["--new-tokens", "2", "--iterations", "2", "--drop", "1", "--batch-size", "2"]
    assert TOOL.main([*arguments, "--output", str(out), "--plot", str(picture), "--json"]) == 0
    written = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == written
    result = ThroughputResult.parse(written)
    assert [(row.context, row.model) for row in result.rows] == [(8, "small"), (8, "tiny"), (16, "small"), (16, "tiny")]
    assert [model.random_weights for model in result.models] == [True, False]
    assert result.models[0].layers == {"jet": 1, "attn": 1} and result.models[1].decode == "eager"
    for ratio in result.ratios:
        first, second = (result.row(name, ratio.context).measured for name in ("small", "tiny"))
        assert ratio.measured["generation"] == first.generation_tokens_per_second / second.generation_tokens_per_second
        assert ratio.measured["prefill"] == first.prefill_tokens_per_second / second.prefill_tokens_per_second
    for row in result.rows:
        assert row.measured.cache_bytes == row.predicted_cache_bytes
    assert result.versions["torch"] and result.device["name"] and result.date and "schema_version" in written
    text = picture.read_text()
    assert "small" in text and "roofline" in text
    assert not list(tmp_path.glob(".*"))


def test_the_published_hybrid_runs_with_a_chunk_far_below_its_window(quick, capsys):
    arguments = ["--random-weights", str(ROOT / "docs" / "benchmarks" / "configs" / "hybrid-46m.json"), "--json"]
    arguments += ["--prefill-chunk", "64", "--contexts", "600", "--new-tokens", "2", "--batch-size", "1"]
    assert TOOL.main([*arguments, "--iterations", "1", "--drop", "0"]) == 0
    (row,) = ThroughputResult.parse(json.loads(capsys.readouterr().out)).rows
    assert row.prefill_chunk == 64 and row.measured.cache_bytes == row.predicted_cache_bytes


def test_roofline_is_the_batch_over_the_time_of_a_step(config_file):
    (row,) = comparison.compare(
        subjects(config_file, 1), replace(PROTOCOL, contexts=(16,)), CPU, SPEED, HEAD, print, lambda part: None
    ).rows
    assert row.measured.generation_roofline == pytest.approx(2 / (row.decode_bytes / 1e9))
    flops_bound = 2 * 16 / (row.prefill_flops / 1e10)
    assert row.measured.prefill_roofline <= flops_bound * (1 + 1e-9)
    share = row.measured.generation_tokens_per_second / row.measured.generation_roofline
    assert row.measured.generation_share == share


def test_every_finished_context_is_kept(config_file):
    kept = []
    result = comparison.compare(subjects(config_file), PROTOCOL, CPU, SPEED, HEAD, print, kept.append)
    assert [len(part.rows) for part in kept] == [2, 4] and kept[-1] == result
    assert [model.name for model in result.models] == ["small", "small (2)"]


def test_a_model_that_does_not_fit_is_left_out_loudly(config_file, monkeypatch):
    real, said = comparison.choose_load, []

    def choose(subject, context, protocol, device):
        if (subject.name, context) == ("small (2)", 24):
            raise UserError("not even a batch of one fits")
        return real(subject, context, protocol, device)

    monkeypatch.setattr(comparison, "choose_load", choose)
    result = comparison.compare(subjects(config_file), PROTOCOL, CPU, SPEED, HEAD, said.append, lambda part: None)
    assert [(row.context, row.model) for row in result.rows] == [(16, "small"), (16, "small (2)"), (24, "small")]
    assert [ratio.context for ratio in result.ratios] == [16]
    assert result.skipped[0].reason == "not even a batch of one fits"
    assert any("left out" in line for line in said)


def test_search_within_a_memory_limit(config_file):
    (subject,) = subjects(config_file, 1)
    cache = predicted_cache_bytes(SHAPE, 16 + 2, "fp32")
    protocol = replace(PROTOCOL, batch_size=None, prefill_chunk=None)
    limit = decode_weight_bytes(SHAPE, "fp32") + 11 * cache
    assert choose_load(subject, 16, replace(protocol, memory_limit=limit), CPU).batch_size == 11
    assert choose_load(subject, 16, replace(protocol, memory_limit=limit - 1), CPU).batch_size == 10
    assert choose_load(subject, 16, replace(protocol, memory_limit=10**12), CPU).batch_size == 64
    with pytest.raises(UserError, match="not even a batch of one"):
        choose_load(subject, 16, replace(protocol, memory_limit=100), CPU)


def test_a_batch_that_does_not_fit_after_all_gets_smaller(config_file, monkeypatch):
    """The search's word is good for opening; memory in pieces may fail later. Nothing of the failed try stays."""
    (subject,) = subjects(config_file, 1)
    real, said = subject.model.forward, []

    def forward(input_ids, **options):
        if input_ids.shape[0] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(input_ids=input_ids, **options)

    monkeypatch.setattr(subject.model, "forward", forward)
    search = replace(PROTOCOL, contexts=(16,), batch_size=None, max_batch=8, memory_limit=10**9)
    result = comparison.compare([subject], search, CPU, SPEED, HEAD, said.append, lambda part: None)
    assert [row.batch_size for row in result.rows] == [6]
    assert [line for line in said if "out of memory" in line] == [
        "16 tokens: out of memory, trying batch 7",
        "16 tokens: out of memory, trying batch 6",
    ]
    fixed = replace(PROTOCOL, contexts=(16,), batch_size=8)
    with pytest.raises(UserError, match="out of memory at 16 tokens with batch 8; choose a smaller --batch-size"):
        comparison.compare([subject], fixed, CPU, SPEED, HEAD, said.append, lambda part: None)


def test_chunks_keep_the_tokens_of_a_pass_in_bounds():
    assert default_chunk(4096, 4, CPU) == 512
    assert default_chunk(100, 4, CPU) == 100
    assert default_chunk(4096, 1000, CPU) == 64
    assert default_chunk(65536, 128, torch.device("cuda")) == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no config.json there"),
        (["--random-weights", "nowhere/config.json"], "no such file"),
        (["--random-weights", "Qwen3-1.7B", "--contexts", "40000"], r"40128 tokens .* 32768 positions"),
        (["{small}", "--contexts", "16"], "model.safetensors"),
        (["--random-weights", "{alien}"], "model_type 'alien' is not supported"),
        (["--random-weights", "{config}", "--contexts", "300"], "428 tokens .* 256 positions"),
        (["--random-weights", "{config}", "--batch-size", "search", "--contexts", "16"], "--memory-limit or a number"),
        (["--random-weights", "{config}", "--decode", "graph", "--contexts", "16"], "CUDA graphs need a GPU"),
        (["--random-weights", "{config}", "--device", "abacus"], "--device abacus: no such device"),
        (["--random-weights", "{config}", "--device", "mps"], "--device mps: no such device"),
        (["--random-weights", "{config}", "--device", "meta"], "--device meta: no such device"),
        (["--random-weights", "{config}", "--memory-limit", "0"], "--memory-limit 0"),
        (["--random-weights", "{config}", "--memory-limit", "inf"], "--memory-limit inf"),
        (["--random-weights", "{config}", "--memory-limit", "nan"], "--memory-limit nan"),
        (["--random-weights", "{config}", "--attention", "flash_attention_2", "--contexts", "16"], "needs a GPU"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, config_file, arguments, message):
    write_json(tmp_path / "alien.json", model_to_hf(SHAPE) | {"model_type": "alien"})
    places = {"config": config_file, "small": config_file.parent, "alien": tmp_path / "alien.json"}
    arguments = [argument.format(**places) for argument in arguments]
    with pytest.raises(UserError, match=message) as error:
        TOOL.main([*arguments, "--output", str(tmp_path / "out.json")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "--random-weights", "b"],
        ["a", "--iterations", "3", "--drop", "3"],
        ["a", "--batch-size", "many"],
        ["a", "--contexts", "4,0"],
        ["a", "--plot", "figure.txt"],
    ],
)
def test_bad_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        TOOL.main(arguments)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_longer_than_the_positions_on_request(config_file):
    options = {"dtype": "fp32", "attention": "auto", "device": CPU, "longest": 500}
    with pytest.raises(UserError, match="add --beyond-positions"):
        open_subject(str(config_file), **options)
    subject = open_subject(str(config_file), beyond_positions=True, **options)
    assert subject.shape.max_position_embeddings == subject.model.config.max_position_embeddings == 500


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_published_models_can_be_made_by_name(name):
    """On the meta device: shapes only. Their parameters are as many as the formulas say."""
    model = random_model(KNOWN_MODELS[name](), "bf16", torch.device("meta"))
    assert sum(x.numel() for x in model.parameters()) == model_cost(KNOWN_MODELS[name](), 1).total_params
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}


def test_names_and_attention(tmp_path):
    assert display_name("Jet-Nemotron-2B") == "Jet-Nemotron-2B"
    assert display_name("a/small/config.json") == "small"
    assert display_name("a/other.json") == "other"
    assert display_name("runs/tiny/export") == "tiny/export"
    assert choose_attention("auto", CPU) == "sdpa"
