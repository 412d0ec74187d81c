"""What the paper measured (arXiv 2508.15884v3, one H100): to stand beside our figures, never in their place."""

from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS

# Jet-Nemotron-2B over Qwen3-1.7B-Base by context (figure 6): prefill, generation.
RATIOS = {
    4096: (1.14, 15.6),
    8192: (1.15, 23.3),
    16384: (1.37, 39.6),
    32768: (1.74, 44.1),
    65536: (2.54, 47.5),
    131072: (4.03, 51.6),
    262144: (6.14, 53.6),
}
RATIO_MODELS = ("Jet-Nemotron-2B", "Qwen3-1.7B")
# Generated tokens per second at 64K over the whole batch, by model (table 9).
GENERATION_AT_64K = {"Qwen3-1.7B": 61, "Qwen2.5-1.5B": 241, "Jet-Nemotron-2B": 2885, "Jet-Nemotron-4B": 1271}
SHAPE_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "layer_plan")


def published_name(shape: ModelConfig) -> str | None:
    """The published model that has this shape, if any; positions and token ids do not matter for speed."""
    for name, make in KNOWN_MODELS.items():
        known = make()
        if all(getattr(known, field) == getattr(shape, field) for field in SHAPE_FIELDS) and (
            {kind: known.mixers[kind] for kind in known.mixers} == {kind: shape.mixers[kind] for kind in shape.mixers}
        ):
            return name
    return None


def paper_generation(shape: ModelConfig, context: int) -> float | None:
    """Tokens per second that the paper generated with this model at this context, where it says."""
    return GENERATION_AT_64K.get(published_name(shape)) if context == 65536 else None


def paper_ratios(first: ModelConfig, second: ModelConfig, context: int) -> tuple[float, float] | None:
    """Prefill and generation of the first model over the second in the paper, where it compares them."""
    if (published_name(first), published_name(second)) != RATIO_MODELS:
        return None
    return RATIOS.get(context)
