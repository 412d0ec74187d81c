"""What a model has to move and to compute at least, and so how fast this device could run it at best.

Decoding moves every weight that it uses once per step, reads each sequence's keys and values, writes those of the new
token, and reads and writes its states. Prefill moves the weights once per chunk and writes the cache; mostly it is
bound by its arithmetic. Activations are left out, so no implementation can be faster than this.
"""

from dataclasses import dataclass

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.mixers.base import Precision
from megatron_jet.configs.mixers.registry import LINEAR_MIXERS
from megatron_jet.configs.model import ModelConfig
from megatron_jet.evaluation.throughput.session import Load

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of something, over the whole batch."""

    bytes: float
    flops: float

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The longer of moving and computing, at these rates."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def precision_of(dtype: str) -> Precision:
    """Bytes per cached element: keys, values and convolution inputs in the model's type, states in fp32."""
    return Precision(kv_bytes=ELEMENT_BYTES[dtype], state_bytes=4)


def predicted_cache_bytes(model: ModelConfig, tokens: int, dtype: str) -> int:
    """Bytes that one sequence of `tokens` tokens keeps, convolution states included."""
    cost = model_cost(model, tokens, precision_of(dtype))
    return cost.cache_bytes + cost.conv_state_bytes


def decode_work(model: ModelConfig, load: Load, dtype: str) -> Work:
    """One decoding step, as the mean over the new tokens of a load.

    Step i (from 1) sees the context and i new tokens, its own included.
    """
    seen = [load.context + i for i in range(1, load.new_tokens + 1)]
    per_sequence = sum(_step_bytes(model, tokens, dtype) for tokens in seen) / len(seen)
    moved = decode_weight_bytes(model, dtype) + load.batch_size * per_sequence
    # The formulas take the mean over a sequence's positions: that of one twice as long is what its middle sees.
    middle = sum(seen) // len(seen)
    flops = load.batch_size * model_cost(model, 2 * middle - 1).flops_per_token
    return Work(moved, flops)


def decode_weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Weights that a decoding step reads: all, but of an untied embedding the batch's rows only, left out here."""
    unused = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return (model_cost(model, 1).total_params - unused) * ELEMENT_BYTES[dtype]


def _step_bytes(model: ModelConfig, tokens: int, dtype: str) -> int:
    """Cache bytes that one sequence's step moves when its query sees `tokens` tokens."""
    precision = precision_of(dtype)
    cost, one_token = model_cost(model, tokens, precision), model_cost(model, 1, precision)
    softmax = [kind for kind in cost.by_kind if kind not in LINEAR_MIXERS]
    read = sum(cost.by_kind[kind].cache_bytes for kind in softmax)
    written = sum(one_token.by_kind[kind].cache_bytes for kind in softmax)
    states = sum(part.cache_bytes for kind, part in cost.by_kind.items() if kind in LINEAR_MIXERS)
    return read + written + 2 * (states + cost.conv_state_bytes)


def prefill_work(model: ModelConfig, load: Load, dtype: str) -> Work:
    """The whole prefill of a load; only the last token of each chunk goes through the LM head."""
    cost = model_cost(model, load.context, precision_of(dtype))
    chunks = -(-load.context // load.prefill_chunk)
    head = 2.0 * model.hidden_size * model.vocab_size
    per_sequence = load.context * (cost.flops_per_token - head) + chunks * head
    cache = load.batch_size * (cost.cache_bytes + cost.conv_state_bytes)
    return Work(chunks * decode_weight_bytes(model, dtype) + cache, load.batch_size * per_sequence)
