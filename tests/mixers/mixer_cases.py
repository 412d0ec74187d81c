"""Small models for the conformance tests: one per mixer, and one that holds every mixer there is."""

from megatron_jet.configs.model import ModelConfig
from megatron_jet.mixers.registry import MIXERS

# Head sizes that are no powers of two, d_v that is no multiple of d_k, and a window shorter than the sequences.
MIXER_SETTINGS = {
    "jet": {"num_heads": 4, "head_dim": 6, "expand_v": 1.5, "conv_size": 3, "dconv_generator_reduction": 4},
    "gated_delta_net": {"num_heads": 2, "head_dim": 8, "expand_v": 1.25, "conv_size": 4, "norm_eps": 1e-6},
    "gla": {"num_heads": 2, "head_dim": 8, "expand_v": 1.5, "gate_low_rank_dim": 5, "gate_logit_normalizer": 4.0},
}
ENTRIES = {"attn": "attn", "swa": "swa:5", "jet": "jet", "gated_delta_net": "gated_delta_net", "gla": "gla"}
KINDS = tuple(MIXERS)


def model_with(*entries: str, **changes) -> ModelConfig:
    """A model with one layer per entry."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": len(entries),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "initializer_range": 0.1,  # larger than usual, so that every path through a layer matters
        "layer_plan": entries,
        "mixers": MIXER_SETTINGS,
    }
    return ModelConfig.parse(settings | changes)


def model_with_every_mixer() -> ModelConfig:
    """Six layers: every registered mixer, and a second window."""
    return model_with(*(ENTRIES[kind] for kind in KINDS), "swa:3")
