"""Small hybrid models with random weights for the tests of the modeling code, and the published oracle."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_jet.convert.hf.configuration_megatron_jet import JetNemotronConfig, MegatronJetConfig
from megatron_jet.convert.hf.modeling_megatron_jet import (
    HybridForCausalLM,
    JetNemotronForCausalLM,
    MegatronJetForCausalLM,
)

ORACLE = Path(__file__).parents[1] / "data" / "jet_tiny"

JET = {
    "num_heads": 2,
    "head_dim": 6,
    "expand_v": 1.5,
    "norm_eps": "1e-5",
    "conv_size": 4,
    "dconv_generator_reduction": 4,
}
GATED_DELTA_NET = {"num_heads": 2, "head_dim": 6, "expand_v": 1.5, "norm_eps": 1e-5, "conv_size": 3}
GLA = {
    "num_heads": 2,
    "head_dim": 6,
    "expand_v": 1.5,
    "norm_eps": 1e-5,
    "gate_low_rank_dim": 3,
    "gate_logit_normalizer": 16.0,
}


def config_dict(**changes) -> dict:
    """A superset config with every mixer; `changes` replace top-level entries."""
    config = {
        "vocab_size": 29,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 512,
        "layer_types": ["jet", "swa", "gated_delta_net", "attn", "gla"],
        "efficient_attention_config": {
            "jet": JET,
            "gated_delta_net": GATED_DELTA_NET,
            "gla": GLA,
            "swa": {"window_size": 5},
        },
        **changes,
    }
    config["num_hidden_layers"] = len(config["layer_types"])
    return config


def random_model(config: dict | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> HybridForCausalLM:
    """A model in eval mode whose every parameter is random and matters, unlike a fresh one's zero generator."""
    config = config or config_dict()
    published = config.get("model_type") == "jet_nemotron"
    model = (
        JetNemotronForCausalLM(JetNemotronConfig(**config))
        if published
        else MegatronJetForCausalLM(MegatronJetConfig(**config))
    )
    generator = torch.Generator().manual_seed(seed)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                noise = 1 + 0.2 * noise
            elif parameter.dim() > 1 and "embed" not in name:
                noise = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(noise)
    return model


def numpy_weights(model: torch.nn.Module) -> dict:
    """Parameters by published name, fp64."""
    return {name: x.detach().double().numpy() for name, x in model.state_dict().items()}


def random_tokens(*shape: int, vocab_size: int = 29, seed: int = 0) -> torch.Tensor:
    """Token ids."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def load_oracle() -> tuple[JetNemotronForCausalLM, dict, dict]:
    """The published tiny model, its expected activations and its expected gradients (without their "grad.")."""
    gradients = load_file(ORACLE / "expected_grads.safetensors")
    model = JetNemotronForCausalLM.from_pretrained(ORACLE).eval()
    return model, load_file(ORACLE / "expected.safetensors"), {k.removeprefix("grad."): v for k, v in gradients.items()}
