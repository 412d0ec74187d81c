"""config.json of every supported model type, and what is refused. Round trips are in tests/model/test_against_hf.py."""

import copy
import math

import pytest

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.families import FAMILIES, Family
from megatron_jet.configs.hf_format import ARCHITECTURES, hf_model_type, model_from_hf, model_to_hf
from megatron_jet.configs.model import ModelConfig

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 21,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
PUBLISHED_2B = QWEN | {
    "model_type": "jet_nemotron",
    "layer_types": ["attn" if i in (14, 19) else "swa" if i in (20, 21) else "jet" for i in range(28)],
    "efficient_attention_config": {
        "jet": {
            "mode": "chunk",
            "expand_v": 2.6666666667,
            "num_heads": 12,
            "head_dim": 96,
            "norm_eps": "1e-5",
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "dconv_implementation": "triton",
        },
        "swa": {"window_size": 1152},
    },
}


def test_qwen2():
    model = model_from_hf(QWEN)
    assert model.layer_plan == ("attn",) * 28
    assert (model.head_dim, model.qkv_bias, model.qk_norm, model.rope_theta) == (128, True, False, 1e6)
    assert model_cost(model, 1024).total_params == 1_543_714_304  # as Hugging Face counts it


def test_published_2b():
    """The string "1e-5", the rounded expand_v, and layer types that transformers does not know."""
    model = model_from_hf(PUBLISHED_2B)
    assert model.layer_plan[13:22] == ("jet", "attn", "jet", "jet", "jet", "jet", "attn", "swa:1152", "swa:1152")
    assert (model.mixers["jet"].norm_eps, model.mixers["jet"].head_v_dim) == (1e-5, 256)
    assert round(model_cost(model, 1024).total_params / 1e9, 3) == 1.965
    written = model_to_hf(model, "bfloat16")
    assert written["layer_types"] == PUBLISHED_2B["layer_types"]
    assert set(PUBLISHED_2B["efficient_attention_config"]["jet"]) == set(written["efficient_attention_config"]["jet"])
    assert (written["model_type"], written["architectures"]) == ("jet_nemotron", ["JetNemotronForCausalLM"])


def test_layer_types_as_a_string_are_parsed():
    """Some copies of the published file hold the list as a string, which the published code passes to eval."""
    text = str(PUBLISHED_2B["layer_types"])
    assert model_from_hf(PUBLISHED_2B | {"layer_types": text}) == model_from_hf(PUBLISHED_2B)
    with pytest.raises(UserError, match="is not a list of mixer names"):
        model_from_hf(PUBLISHED_2B | {"layer_types": "__import__('os').getpid()"})


def test_sliding_windows_of_qwen2():
    model = model_from_hf(QWEN | {"use_sliding_window": True})
    assert model.layer_plan == ("attn",) * 21 + ("swa:4096",) * 7
    types = ["full_attention"] * 27 + ["sliding_attention"]
    on = QWEN | {"layer_types": types, "use_sliding_window": True}
    assert model_from_hf(on).layer_plan[-2:] == ("attn", "swa:4096")
    with pytest.raises(UserError, match="'sliding_attention' but use_sliding_window is not true"):
        model_from_hf(QWEN | {"layer_types": types})


def test_rope_parameters_of_transformers_5():
    config = {key: value for key, value in QWEN.items() if key != "rope_theta"}
    model = model_from_hf(config | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert model.rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({"layer_plan": ("jet", "swa:3", "attn")}, "jet_nemotron"),
        ({"layer_plan": ("jet", "swa:3", "swa:4")}, "megatron_jet"),
        ({"layer_plan": ("gla", "attn", "attn")}, "megatron_jet"),
        ({"layer_plan": ("jet", "attn", "attn"), "qkv_bias": False}, "megatron_jet"),
        ({"layer_plan": ("jet", "attn", "attn"), "head_dim": 64}, "jet_nemotron"),
        ({"layer_plan": ("attn", "attn", "attn")}, "qwen2"),
        ({"layer_plan": ("attn", "attn", "attn"), "head_dim": 64}, "jet_nemotron"),
        ({"layer_plan": ("attn",) * 3, "base_model_type": "llama", "qkv_bias": False}, "llama"),
    ],
)
def test_the_narrowest_format_is_chosen(changes, model_type):
    tiny = model_from_hf(PUBLISHED_2B).replace(
        num_layers=3,
        layer_plan=("attn",) * 3,
        mixers={
            "jet": {"num_heads": 2, "head_dim": 4},
            "gla": {"num_heads": 2, "head_dim": 4},
        },
    )
    model = tiny.replace(**changes)
    assert hf_model_type(model) == model_type
    used = {kind: mixer for kind, mixer in model.mixers.items() if kind in model.layer_plan}
    assert model_from_hf(model_to_hf(model)) == model.replace(mixers=used)


def without(config: dict, key: str) -> dict:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QWEN | {"model_type": "mamba2"}, "model_type 'mamba2' is not supported"),
        (without(QWEN, "hidden_size"), "hidden_size is missing"),
        (QWEN | {"rope_scaling": {"rope_type": "yarn"}}, "RoPE scaling 'yarn' is not supported"),
        (QWEN | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (QWEN | {"layer_types": ["linear_attention"] * 28}, "layer_types has 'linear_attention'"),
        (without(PUBLISHED_2B, "layer_types"), "layer_types is missing"),
        (PUBLISHED_2B | {"layer_types": ["jet"] * 27}, "27 entries but the model has 28 layers"),
        (PUBLISHED_2B | {"layer_types": ["mamba"] * 28}, "unknown mixer 'mamba'"),
        (PUBLISHED_2B | {"efficient_attention_config": {"swa": {"window_size": 9}}}, "mixers.jet is not given"),
        (PUBLISHED_2B | {"windows": [3]}, "windows has 1 entries"),
        (
            PUBLISHED_2B | {"efficient_attention_config": {"jet": {"num_heads": 2, "head_dim": 4, "heads": 3}}},
            "efficient_attention_config.jet.heads is not known",
        ),
        (
            PUBLISHED_2B
            | {"layer_types": ["jet"] * 28}
            | {"efficient_attention_config": {"jet": {"num_heads": 12, "head_dim": 96, "expand_v": 1.03}}},
            "not a whole d_v",
        ),
        (PUBLISHED_2B | {"base_model_type": "gpt2"}, "base_model_type 'gpt2' is not supported"),
    ],
)
def test_what_cannot_be_expressed_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        model_from_hf(config)


# What somebody's config.json may hold in place of a sensible value.
ODD = [None, "x", "", -1, 0, 1.5, True, math.nan, math.inf, [], ["x"], [None], {}, {"a": 1}, 10**12]
STARTING_POINTS = {
    "jet_nemotron": PUBLISHED_2B,
    "megatron_jet": PUBLISHED_2B
    | {"model_type": "megatron_jet", "base_model_type": "qwen2", "windows": [None] * 20 + [9, 9] + [None] * 6}
    | {"qkv_bias": True, "qk_norm": False, "head_dim": 128},
    "qwen2": QWEN | {"use_sliding_window": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama": QWEN
    | {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
}


def places(config: dict, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key, nested ones as a path."""
    found = []
    for key, value in config.items():
        found.append((*before, key))
        if isinstance(value, dict):
            found += places(value, (*before, key))
    return found


@pytest.mark.parametrize("model_type", STARTING_POINTS)
def test_any_value_anywhere_is_either_taken_or_refused_in_one_line(model_type):
    start = STARTING_POINTS[model_type]
    assert model_from_hf(start)
    refused = 0
    for place in places(start):
        for odd in ODD:
            config = copy.deepcopy(start)
            inner = config
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            try:
                model_from_hf(config, "dir/config.json")
            except UserError as error:
                assert str(error).startswith("dir/config.json: ") and "\n" not in str(error), (place, odd)
                refused += 1
    assert refused > 150, "most of these values cannot be meant"
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "intermediate_size"):
        for odd in (None, "x", "", -1, 0, 1.5, True, math.nan, [], {}):
            with pytest.raises(UserError, match=f"^dir/config.json: {key}"):
                model_from_hf(start | {key: odd}, "dir/config.json")


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_a_file_that_holds_no_mapping(content):
    with pytest.raises(UserError, match=r"config\.json: holds no mapping"):
        model_from_hf(content)


def test_scaling_without_a_type_is_not_guessed():
    with pytest.raises(UserError, match="rope_scaling has no rope_type"):
        model_from_hf(QWEN | {"rope_scaling": {"factor": 8.0}})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_numbers_of_a_scaling_that_are_text_are_refused(key, name):
    scaling = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = QWEN | {"model_type": "llama", key: {"rope_type": "llama3", **scaling}}
    assert model_from_hf(config).rope_scaling.to_dict() == scaling
    for wrong in (str(scaling[name]), True):
        config = QWEN | {"model_type": "llama", key: {"rope_type": "llama3", **scaling, name: wrong}}
        with pytest.raises(UserError, match=rf"config.json: {key}: {name}: .* \(got {wrong!r}\)"):
            model_from_hf(config)


def test_a_new_family_is_one_row(monkeypatch):
    """Nothing else names the families: the row makes a config.json readable, writable and a base of hybrids."""
    family = Family("MistralForCausalLM", qkv_bias=False)
    monkeypatch.setitem(FAMILIES, "mistral", family)
    monkeypatch.setitem(ARCHITECTURES, "mistral", family.architecture)  # made from the rows at import
    model = model_from_hf(QWEN | {"model_type": "mistral"})
    assert (model.base_model_type, model.qkv_bias) == ("mistral", False)
    written = model_to_hf(model)
    assert written["architectures"] == ["MistralForCausalLM"] and model_from_hf(written) == model
    hybrid = model.with_plan(("swa:8", *model.layer_plan[1:]))
    assert hf_model_type(hybrid) == "megatron_jet" and model_from_hf(model_to_hf(hybrid)) == hybrid
    assert ModelConfig.parse(hybrid.to_dict()) == hybrid


def test_a_family_without_a_row_is_refused():
    model = model_from_hf(QWEN).to_dict()
    with pytest.raises(UserError, match="base_model_type 'mistral' is not supported; known: qwen2, qwen3, llama"):
        ModelConfig.parse(model | {"base_model_type": "mistral"})
