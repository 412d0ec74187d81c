"""Random models: Megatron and the Hugging Face code compute the same logits and gradients from the same weights."""

import pytest
import torch

from layout_runs import next_token_loss, relative_error
from megatron_jet.configs.hf_format import model_from_hf, model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.convert.weights import megatron_to_hf
from megatron_jet.model.builder import build_model
from megatron_jet.model.state import gather_tensors
from mixers.mixer_cases import model_with

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from model.random_models import hf_model, models  # noqa: E402

# Two implementations in fp32: other orders of sums, other chunk algorithms. See test_layouts.py for gradients.
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 5e-4


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
