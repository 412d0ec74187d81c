"""Shapes of the published models that estimates and tests refer to. Source: their config.json files on the Hub."""

from collections.abc import Callable

from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.model import ModelConfig

_QWEN_VOCAB = 151936
_END_OF_TEXT = 151643


def qwen2_5_1_5b() -> ModelConfig:
    """Qwen2.5-1.5B, the base of Jet-Nemotron-2B."""
    return ModelConfig(
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=_QWEN_VOCAB,
        max_position_embeddings=131072,
        bos_token_id=_END_OF_TEXT,
        eos_token_id=_END_OF_TEXT,
        layer_plan=("attn",) * 28,
    )


def qwen2_5_3b() -> ModelConfig:
    """Qwen2.5-3B, the base of Jet-Nemotron-4B."""
    return ModelConfig(
        hidden_size=2048,
        intermediate_size=11008,
        num_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=128,
        vocab_size=_QWEN_VOCAB,
        max_position_embeddings=32768,
        bos_token_id=_END_OF_TEXT,
        eos_token_id=_END_OF_TEXT,
        layer_plan=("attn",) * 36,
    )


def qwen3_1_7b() -> ModelConfig:
    """Qwen3-1.7B, the model the paper compares speed with."""
    return ModelConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=_QWEN_VOCAB,
        max_position_embeddings=32768,
        qkv_bias=False,
        qk_norm=True,
        base_model_type="qwen3",
        layer_plan=("attn",) * 28,
    )


def jet_nemotron_2b_model() -> ModelConfig:
    """Jet-Nemotron-2B as published: full attention in layers 14 and 19 (0-based), windows in 20 and 21."""
    plan = tuple("attn" if i in (14, 19) else "swa:1152" if i in (20, 21) else "jet" for i in range(28))
    return qwen2_5_1_5b().with_plan(plan, {"jet": JetBlockConfig(num_heads=12, head_dim=96, expand_v=256 / 96)})


def jet_nemotron_4b_model() -> ModelConfig:
    """Jet-Nemotron-4B as published: full attention in layers 17, 20 and 32 (0-based), windows in seven others."""
    windows = (5, 16, 19, 21, 22, 25, 27)
    plan = tuple("attn" if i in (17, 20, 32) else "swa:2048" if i in windows else "jet" for i in range(36))
    return qwen2_5_3b().with_plan(plan, {"jet": JetBlockConfig(num_heads=16, head_dim=128, expand_v=2.0)})


KNOWN_MODELS: dict[str, Callable[[], ModelConfig]] = {
    "Qwen2.5-1.5B": qwen2_5_1_5b,
    "Qwen2.5-3B": qwen2_5_3b,
    "Qwen3-1.7B": qwen3_1_7b,
    "Jet-Nemotron-2B": jet_nemotron_2b_model,
    "Jet-Nemotron-4B": jet_nemotron_4b_model,
}
