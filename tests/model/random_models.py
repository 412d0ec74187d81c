"""Random models of any shape and order of mixers, and the Hugging Face model with given weights."""

import hypothesis.strategies as st
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_jet.configs.hf_format import model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.hf_package import MODELS
from mixers.mixer_cases import model_with


@st.composite
def delta_rule_settings(draw) -> dict:
    """Head counts, widths and expansions, d_v often no multiple of d_k and expand_v often no whole number."""
    head_dim = draw(st.integers(2, 10))
    head_v_dim = draw(st.integers(2, 14))
    return {
        "num_heads": draw(st.sampled_from([1, 2, 3, 5, 12])),
        "head_dim": head_dim,
        "expand_v": head_v_dim / head_dim,
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "conv_size": draw(st.integers(2, 4)),
    }


@st.composite
def models(draw) -> ModelConfig:
    """Models with any order of mixers."""
    kinds = st.sampled_from(["jet", "gated_delta_net", "gla", "attn", "swa:1", "swa:7", "swa:30"])
    plan = draw(st.lists(kinds, min_size=1, max_size=3))
    jet, gdn, gla = draw(delta_rule_settings()), draw(delta_rule_settings()), draw(delta_rule_settings())
    value_dim = jet["num_heads"] * round(jet["head_dim"] * jet["expand_v"])
    jet["dconv_generator_reduction"] = draw(st.integers(1, min(8, value_dim)))
    del gla["conv_size"]
    gla |= {"gate_low_rank_dim": draw(st.integers(1, 6)), "gate_logit_normalizer": draw(st.sampled_from([1.0, 16.0]))}
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    hidden = groups * per_group * 8
    return model_with(
        *plan,
        hidden_size=hidden,
        num_attention_heads=groups * per_group,
        num_key_value_heads=groups,
        mixers={"jet": jet, "gated_delta_net": gdn, "gla": gla},
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        tie_word_embeddings=draw(st.booleans()),
    )


def hf_model(model: ModelConfig, tensors: dict[str, torch.Tensor]):
    """The Hugging Face model of the format that fits, with these weights."""
    settings = model_to_hf(model)
    model_type = settings["model_type"]
    if model_type in MODELS:
        hf = MODELS[model_type](MODELS[model_type].config_class(**settings))
    else:
        del settings["model_type"]
        hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    missing, unexpected = hf.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if model.tie_word_embeddings else set())
    return hf
