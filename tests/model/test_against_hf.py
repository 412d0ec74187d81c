"""Random models: Megatron and the Hugging Face code compute the same logits and gradients from the same weights."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers import AutoConfig, AutoModelForCausalLM

from layout_runs import next_token_loss, relative_error
from megatron_jet.configs.hf_format import model_from_hf, model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.hf_package import MODELS
from megatron_jet.convert.weights import megatron_to_hf
from megatron_jet.model.builder import build_model
from megatron_jet.model.state import gather_tensors
from mixers.mixer_cases import model_with

# Two implementations in fp32: other orders of sums, other chunk algorithms. See test_layouts.py for gradients.
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 5e-4


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


def compare(model: ModelConfig, parallel, length: int) -> None:
    chunk = build_model(model, parallel)[0]
    weights = megatron_to_hf(model, gather_tensors([chunk]))
    hf = hf_model(model, weights)
    tokens = torch.randint(0, model.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))
    logits, expected = chunk(tokens, None, None), hf(tokens).logits
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE * scale, rtol=0)
    next_token_loss(logits, tokens).backward()
    next_token_loss(expected, tokens).backward()
    for parameter in chunk.parameters():
        parameter.data = parameter.grad
    grads = megatron_to_hf(model, gather_tensors([chunk]))
    largest = max(grad.norm().item() for grad in grads.values())
    for name, parameter in hf.named_parameters():
        grad = grads[name]
        close = (grad - parameter.grad).norm() < 1e-6 * largest  # a gradient that is nothing but rounding
        assert close or relative_error(grad, parameter.grad) < GRADIENT_TOLERANCE, name


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model=models(), length=st.sampled_from([2, 3, 40, 70]))
def test_random_hybrids(single_rank, model, length):
    compare(model, single_rank, length)


@pytest.mark.parametrize(
    "traits",
    [
        {"base_model_type": "qwen2"},
        {"base_model_type": "qwen3", "qkv_bias": False, "qk_norm": True, "head_dim": 12},
        {"base_model_type": "llama", "qkv_bias": False, "head_dim": 12},
    ],
    ids=lambda traits: traits["base_model_type"],
)
def test_plain_models_of_transformers(single_rank, traits):
    """Full attention against transformers' own Qwen2, Qwen3 and Llama."""
    compare(model_with("attn", "attn", **traits), single_rank, 40)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(model=models())
def test_config_round_trip(model):
    """config.json and back gives the model, less the mixers that no layer uses."""
    used = {kind: mixer for kind, mixer in model.mixers.items() if kind in model.layer_plan}
    assert model_from_hf(model_to_hf(model)) == model.with_plan(model.layer_plan, used)
