"""Sums of the mixers' own answers: parameters, FLOPs and cache bytes of a whole model, by layer type. No torch."""

from collections import defaultdict

from megatron_jet.configs.base import ResultModel
from megatron_jet.configs.layer_plan import split_entry
from megatron_jet.configs.mixers.base import DEFAULT_PRECISION, Precision
from megatron_jet.configs.mixers.registry import LINEAR_MIXERS
from megatron_jet.configs.model import ModelConfig


class KindCost(ResultModel):
    """What the layers of one mixer kind cost together (their MLPs and norms are not included)."""

    layers: int
    mixer_params: int
    flops_per_token: float
    cache_bytes: int
    conv_state_bytes: int


class ModelCost(ResultModel):
    """Cost of a model at one context length (tokens). FLOPs are forward, per token; cache is per sequence."""

    context: int
    total_params: int
    embedding_params: int
    mlp_params: int
    norm_params: int
    mixer_params: int
    flops_per_token: float
    cache_bytes: int
    conv_state_bytes: int
    by_kind: dict[str, KindCost]


def model_cost(config: ModelConfig, context: int, precision: Precision = DEFAULT_PRECISION) -> ModelCost:
    """Cost of `config` at `context` tokens.

    The LM head counts towards FLOPs whether tied or not; the embedding look-up is free.
    """
    layers = config.num_layers
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    mlp = 3 * config.hidden_size * config.intermediate_size * layers
    norms = (2 * layers + 1) * config.hidden_size
    sums: dict[str, list] = defaultdict(lambda: [0, 0, 0.0, 0, 0])
    for i in range(layers):
        mixer = config.mixer(i)
        row = sums[split_entry(config.layer_plan[i])[0]]
        row[0] += 1
        row[1] += mixer.num_params(config.shape)
        row[2] += mixer.flops_per_token(config.shape, context)
        row[3] += mixer.cache_bytes(config.shape, context, precision)
        row[4] += mixer.conv_state_bytes(config.shape, precision)
    by_kind = {
        kind: KindCost(layers=n, mixer_params=p, flops_per_token=f, cache_bytes=c, conv_state_bytes=s)
        for kind, (n, p, f, c, s) in sums.items()
    }
    mixer_params = sum(cost.mixer_params for cost in by_kind.values())
    mixer_flops = sum(cost.flops_per_token for cost in by_kind.values())
    return ModelCost(
        context=context,
        total_params=embedding + mlp + norms + mixer_params,
        embedding_params=embedding,
        mlp_params=mlp,
        norm_params=norms,
        mixer_params=mixer_params,
        flops_per_token=mixer_flops + 2.0 * mlp + 2.0 * config.hidden_size * config.vocab_size,
        cache_bytes=sum(cost.cache_bytes for cost in by_kind.values()),
        conv_state_bytes=sum(cost.conv_state_bytes for cost in by_kind.values()),
        by_kind=by_kind,
    )


# One H100 SXM, bf16 without sparsity. Only ratios between models matter where this is used to rank.
H100_FLOPS_PER_SECOND = 989e12
H100_BYTES_PER_SECOND = 3.35e12
WEIGHT_BYTES = 2


def analytic_tokens_per_second(
    config: ModelConfig, context: int, batch_size: int, precision: Precision = DEFAULT_PRECISION
) -> float:
    """Upper bound of generation throughput at a context length: the roofline of one decoding step.

    A step moves every weight once, reads each sequence's K/V cache, and reads and writes its recurrent state; it takes
    whichever is longer, that or the arithmetic. Unlike a measurement it is the same on every machine.

    Args:
        config: the model.
        context: tokens already in the cache.
        batch_size: sequences decoded together.

    Returns:
        Tokens per second over the whole batch, on one H100.
    """
    cost = model_cost(config, context, precision)
    kinds = {kind: cost.by_kind[kind].cache_bytes for kind in cost.by_kind}
    state = sum(size for kind, size in kinds.items() if kind in LINEAR_MIXERS) + cost.conv_state_bytes
    moved = WEIGHT_BYTES * cost.total_params + batch_size * (cost.cache_bytes + state)
    # The mean over the positions of a sequence twice as long is what the token at `context` sees.
    arithmetic = batch_size * model_cost(config, 2 * context - 1, precision).flops_per_token
    return batch_size / max(moved / H100_BYTES_PER_SECOND, arithmetic / H100_FLOPS_PER_SECOND)
