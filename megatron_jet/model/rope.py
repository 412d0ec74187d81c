"""Rotary frequencies stretched for long contexts."""

import math

from torch import Tensor

from megatron_jet.configs.families import RopeScaling


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's scaling: long wavelengths grow by `factor`, short ones stay, those between go over smoothly.

    Args:
        frequencies: radians per token, of any shape.
        scaling: see there.

    Returns:
        Radians per token, of the same shape.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original length
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * ((1 - kept) / scaling.factor + kept)
