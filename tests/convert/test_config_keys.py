"""config.json of other people's models: read as transformers reads it, or refused by name."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from convert.convert_cases import check_one_line, convert, copy_oracle, edit_config
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.hf_format import ARCHITECTURES, model_from_hf

CLASSES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
}
ABSENT = object()
FULL, SLIDING = "full_attention", "sliding_attention"
GRID = {
    "use_sliding_window": (ABSENT, True, False),
    "sliding_window": (ABSENT, None, 8, 4096),
    "max_window_layers": (ABSENT, 0, 2, 28),
    "layer_types": (ABSENT, None, [FULL] * 3, [FULL, SLIDING, FULL], [SLIDING] * 3, [FULL] * 2),
}


def plain(model_type: str, **changes) -> dict:
    return {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]], **SHAPE, **changes}


def windows_of_transformers(model_type: str, settings: dict) -> list[int | None] | None:
    """Window of each layer in transformers' model; None where it cannot be built or run."""
    try:
        config = CLASSES[model_type](**SHAPE, **settings)
    except Exception:  # its validators raise classes of their own
        return None
    if model_type == "llama":
        return [None] * 3  # modeling_llama.py looks at none of these keys
    windows = [config.sliding_window if kind == SLIDING else None for kind in config.layer_types]
    runs = all(window or kind == FULL for window, kind in zip(windows, config.layer_types, strict=True))
    return windows if runs else None


@pytest.mark.parametrize("model_type", CLASSES)
def test_windows_are_those_of_transformers(model_type):
    """Every combination of the four keys: the same windows, or refused by both."""
    seen = set()
    for values in itertools.product(*GRID.values()):
        settings = {key: value for key, value in zip(GRID, values, strict=True) if value is not ABSENT}
        expected = windows_of_transformers(model_type, settings)
        try:
            plan = model_from_hf(plain(model_type, **settings)).layer_plan
        except UserError:
            plan = None
        found = None if plan is None else [None if entry == "attn" else int(entry[4:]) for entry in plan]
        assert found == expected, settings
        seen.add(str(expected))
    assert len(seen) >= (2 if model_type == "llama" else 6), "the grid reaches few cases"


ROPES = [
    {},
    {"rope_theta": 5e5},
    {"rope_scaling": None, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 7e5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default", "rope_theta": 6e5}, "rope_theta": 7e5},
]


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("rope", ROPES, ids=range(len(ROPES)))
def test_the_base_of_the_rotary_embedding_is_that_of_transformers(model_type, rope):
    expected = CLASSES[model_type](**SHAPE, **json.loads(json.dumps(rope))).rope_parameters["rope_theta"]
    assert model_from_hf(plain(model_type, **rope)).rope_theta == expected


# config.json of well-known models, as their publishers wrote them.
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
KNOWN = {"qwen2.5": QWEN25, "qwen3": QWEN3, "llama3.2": LLAMA32, "smollm2": SMOLLM2}
SAVED_AGAIN = {
    "unsloth_fixed": True,
    "max_sequence_length": 99,
    "activation": "swiglu",
    "unsloth_version": "2026.1.1",
    "pad_token_id": 3,
    "_name_or_path": "x/y",
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("changes", [{}, SAVED_AGAIN], ids=["published", "fine-tuned"])
def test_well_known_models_are_full_attention(name, changes):
    model = model_from_hf(KNOWN[name] | changes)
    assert set(model.layer_plan) == {"attn"} and model.num_layers == KNOWN[name]["num_hidden_layers"]


def test_the_projects_own_files_are_read():
    paths = sorted((Path(__file__).parents[2] / "docs" / "benchmarks" / "configs").glob("*.json"))
    assert len(paths) >= 2
    for path in paths:
        assert model_from_hf(json.loads(path.read_text()), str(path))


@pytest.mark.parametrize("name", KNOWN)
def test_what_transformers_writes_with_every_default_is_read(name):
    """`save_pretrained` of many releases wrote all defaults of the base class; none of them changes a model."""
    given = {key: value for key, value in KNOWN[name].items() if key != "architectures"}
    config = CLASSES[given["model_type"]](**json.loads(json.dumps(given)))
    assert model_from_hf(json.loads(config.to_json_string(use_diff=False))) == model_from_hf(KNOWN[name])


REFUSED = {
    "is_causal": False,
    "use_bidirectional_attention": True,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8,
    "logit_scale": 0.0625,
    "query_pre_attn_scalar": 224,
    "rope_interleaved": True,
    "use_mrope": True,
    "attention_bias": True,
    "mlp_bias": True,
    "partial_rotary_factor": 0.5,
    "layer_norm_eps": 1e-5,
    "use_qk_norm": True,
    "clip_qkv": 8.0,
    "no_rope_layers": [1, 1, 0],
    "num_local_experts": 8,
    "attention_chunk_size": 8192,
    "rms_norm_eps": None,
    "tie_word_embeddings": None,
    "hidden_act": "gelu",
    "hidden_activation": "gelu",
    "original_max_position_embeddings": 4096,
    "text_config": {"hidden_size": 8},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "quantization": {"group_size": 64, "bits": 4},
    "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"},
    "architectures": ["Qwen2ForSequenceClassification"],
    "a_key_of_tomorrow": 1,
}


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_may_change_the_model_is_refused_by_name(model_type, key):
    with pytest.raises(UserError, match=rf"^here: .*\b{key}\b") as caught:
        model_from_hf(plain(model_type, **{key: REFUSED[key]}), "here")
    assert "\n" not in str(caught.value)


OFF = {
    "is_causal": True,
    "final_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1,
    "rope_interleaved": False,
    "use_mrope": False,
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "a_key_of_tomorrow": False,
    "auto_map": {},
}


@pytest.mark.parametrize("key", OFF)
def test_a_feature_that_is_off_is_taken(key):
    assert model_from_hf(plain("llama", **{key: OFF[key]})) == model_from_hf(plain("llama"))


def test_a_scale_of_true_is_no_one():
    """In Python True == 1."""
    with pytest.raises(UserError, match="logits_scaling=True"):
        model_from_hf(plain("llama", logits_scaling=True))


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (
            {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}},
            "per kind of layer",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "rope_parameters.mrope_section"),
    ],
)
def test_rotary_settings_that_are_not_computed_here_are_named(rope, words):
    for model_type in ("qwen2", "llama"):
        with pytest.raises(UserError, match=words):
            model_from_hf(plain(model_type, rope_parameters=rope))


@pytest.mark.parametrize("key", ["is_causal", "final_logit_softcapping", "quantization_config", "a_key_of_tomorrow"])
def test_hybrids_are_read_as_strictly(key, tmp_path, capsys):
    oracle = copy_oracle(tmp_path / "hf")
    edit_config(oracle, lambda config: config.update({key: REFUSED[key]}))
    assert convert("import", oracle, tmp_path / "out") == 1
    check_one_line(capsys, ["config.json", key])
    assert not (tmp_path / "out").exists()
