"""config.json: the published files load and save unchanged under transformers 5, and bad ones are refused in words."""

import json

import pytest

from convert.hf_cases import JET, ORACLE, config_dict
from megatron_jet.configs.families import FAMILIES
from megatron_jet.configs.hf_format import model_from_hf
from megatron_jet.convert.hf.configuration_megatron_jet import JetNemotronConfig, MegatronJetConfig

# As published, Jet-Nemotron-2B: note the string, and the expand_v that means 256 / 96.
PUBLISHED_2B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
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


@pytest.mark.parametrize("config_class", [JetNemotronConfig, MegatronJetConfig])
def test_transformers_is_told_that_a_config_without_layers_cannot_be_made(config_class):
    """Releases before 5.23 make one to compare with (the oldest of them runs in `make test-oldest`)."""
    with pytest.raises(Exception, match="layer_types is missing"):
        config_class()
    assert config_class.has_no_defaults_at_init is True


@pytest.mark.parametrize("base", [None, *FAMILIES])
@pytest.mark.parametrize("config_class", [JetNemotronConfig, MegatronJetConfig])
def test_a_key_that_is_left_out_means_the_same_to_both_readers(config_class, base):
    """Conversion and the modeling code must not see two models in one file."""
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    bare = {name: PUBLISHED_2B[name] for name in (*required, "layer_types", "efficient_attention_config")}
    if base is not None and config_class is MegatronJetConfig:
        bare["base_model_type"] = base
    model, config = model_from_hf({"model_type": config_class.model_type, **bare}), config_class(**bare)
    for name in (
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "initializer_range",
        "tie_word_embeddings",
        "num_key_value_heads",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ):
        assert getattr(model, name) == getattr(config, name), name
    assert model.num_key_value_heads == 2, "as published"
    assert model.head_dim == config.softmax_head_dim and model.rope_scaling is None is config.rope_scaling
    assert model.qkv_bias == getattr(config, "qkv_bias", True) and model.qk_norm == getattr(config, "qk_norm", False)
    # The published code's.
    assert (model.rope_theta, model.max_position_embeddings) == (1e6, 32768)


@pytest.mark.parametrize("config_class", [JetNemotronConfig, MegatronJetConfig])
def test_rope_parameters_decide_for_both_readers(config_class):
    given = {**PUBLISHED_2B, "rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    model = model_from_hf({"model_type": config_class.model_type, **given})
    assert model.rope_theta == config_class(**given).rope_theta == 5e5


@pytest.mark.parametrize("source", ["oracle", "2b"])
def test_published_keys_survive_loading_and_saving(tmp_path, source):
    published = json.loads((ORACLE / "config.json").read_text()) if source == "oracle" else PUBLISHED_2B
    config = JetNemotronConfig(**published)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for key, value in published.items():
        renamed = {"torch_dtype": "dtype"}.get(key, key)  # transformers 5 writes the new name
        assert saved[renamed] == value, key
    again = JetNemotronConfig.from_pretrained(tmp_path)
    assert again.layer_types == published["layer_types"]
    assert again.efficient_attention_config == published["efficient_attention_config"]


def test_settings_of_the_published_jet_block():
    config = JetNemotronConfig(**PUBLISHED_2B)
    settings = config.mixer_settings("jet")
    assert settings["head_v_dim"] == 256
    assert settings["norm_eps"] == 1e-5 and isinstance(settings["norm_eps"], float)
    assert config.window(20) == 1152 and config.window(14) is None and config.window(0) is None
    assert config.softmax_head_dim == 128


def test_layer_types_as_a_string_are_parsed_and_not_run():
    config = config_dict(layer_types=["jet", "attn"])
    assert MegatronJetConfig(**{**config, "layer_types": "['jet', 'attn']"}).layer_types == ["jet", "attn"]
    for text in ("['jet'] * 2", "__import__('os').getcwd()", "jet", "4", "[4]"):
        with pytest.raises(ValueError, match="not a list of mixer names"):
            MegatronJetConfig(**{**config, "layer_types": text})


def test_superset_round_trip(tmp_path):
    config = config_dict(layer_types=["gla", "swa", "swa"], windows=[None, 3, 8], qk_norm=True, qkv_bias=False)
    MegatronJetConfig(**config).save_pretrained(tmp_path)
    again = MegatronJetConfig.from_pretrained(tmp_path)
    assert [again.window(layer) for layer in range(3)] == [None, 3, 8]
    assert again.qk_norm and not again.qkv_bias and again.head_dim == 4


def test_rope_theta_as_transformers_5_writes_it():
    config = config_dict(rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
    assert MegatronJetConfig(**config).rope_theta == 5000.0


def jet(**changes):
    return {"efficient_attention_config": {"jet": {**JET, **changes}}, "layer_types": ["jet"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["jet", "rwkv"]}, "'rwkv'; megatron_jet knows jet, swa, attn"),
        ({"num_hidden_layers": 7}, "layer_types has 5 entries for 7 layers"),
        ({"layer_types": None}, "layer_types is missing"),
        ({"windows": [None, 0, None, None, None]}, "layer 1 is 'swa' but its window is 0"),
        ({"windows": [None, 4]}, "windows has 2 entries for 5 layers"),
        ({"windows": []}, "windows has 0 entries for 5 layers"),
        ({"efficient_attention_config": None}, "efficient_attention_config has no 'jet'"),
        ({"layer_types": ["swa"], "efficient_attention_config": {}}, "its window is None"),
        (jet(expand_v=1.3), "expand_v=1.3 times head_dim=6 is not a whole number"),
        (jet(num_heads=0), "num_heads=0 is not a positive int"),
        (jet(conv_size=2.5), "conv_size=2.5 is not a positive int"),
        (jet(norm_eps="small"), "norm_eps='small' is not a number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 does not divide by num_key_value_heads=3"),
        ({"head_dim": 3}, "head_dim=3 is not even"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*not supported"),
        ({"hidden_size": "16"}, "hidden_size"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    config = config_dict()
    config.update(changes)
    if "layer_types" in changes and changes["layer_types"] and "num_hidden_layers" not in changes:
        config["num_hidden_layers"] = len(changes["layer_types"])
    with pytest.raises(Exception, match=message):
        MegatronJetConfig(**config)


def test_the_published_format_has_three_mixers_only():
    with pytest.raises(Exception, match="'gla'; jet_nemotron knows jet, swa, attn"):
        JetNemotronConfig(**{**PUBLISHED_2B, "layer_types": ["gla"] * 28})
