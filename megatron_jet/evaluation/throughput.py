"""Generation throughput of Hugging Face models on this device: chunked prefill, then decoding token by token.

Weights do not matter for speed, so candidates are timed with random ones.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.hf_format import model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.stages import ThroughputConfig
from megatron_jet.convert.hf.cache import HybridCache
from megatron_jet.convert.hf_package import MODELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the whole batch, by context length (as JSON keys: strings)."""

    generation: dict[str, float]
    prefill: dict[str, float]


def measure_generation(model: ModelConfig, settings: ThroughputConfig, dtype: str) -> Speed:
    """Time a model of this shape with random weights."""
    return measure_model(random_model(model, dtype), settings)


@torch.no_grad()
def measure_model(model: PreTrainedModel, settings: ThroughputConfig) -> Speed:
    """Time a loaded model at every context length of the settings.

    Each figure is the median over the iterations after the warm-up. All contexts take part in every iteration, so that
    a slow spell of the machine does not fall on one of them alone.

    Raises:
        UserError: a context the model has no positions for.
    """
    longest = max(settings.contexts) + settings.new_tokens
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"throughput.contexts: {longest} tokens are more than the model's {model.config.max_position_embeddings} "
            "positions; choose shorter contexts"
        )
    model.eval()
    times: dict[int, list[tuple[float, float]]] = {context: [] for context in settings.contexts}
    for iteration in range(settings.warmup + settings.iterations):
        for context in settings.contexts:
            prefill, decode = time_once(model, context, settings, seed=iteration)
            if iteration >= settings.warmup:
                times[context].append((prefill, decode))
    batch = settings.batch_size
    return Speed(
        generation={
            str(context): batch * settings.new_tokens / statistics.median(decode for _, decode in rows)
            for context, rows in times.items()
        },
        prefill={
            str(context): batch * context / statistics.median(prefill for prefill, _ in rows)
            for context, rows in times.items()
        },
    )


def time_once(model: PreTrainedModel, context: int, settings: ThroughputConfig, seed: int) -> tuple[float, float]:
    """Seconds of one prefill of `context` random tokens per sequence, and of decoding `new_tokens` greedily."""
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.batch_size, context)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)  # [b, context]
    cache = HybridCache(model.config, context + settings.new_tokens) if _is_ours(model) else None
    start = _clock(device)
    for chunk in tokens.split(settings.prefill_chunk, dim=1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    middle = _clock(device)
    for _ in range(settings.new_tokens):
        output = model(input_ids=_greedy(output.logits), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return middle - start, _clock(device) - middle


def random_model(model: ModelConfig, dtype: str) -> PreTrainedModel:
    """A Hugging Face model of this shape on this machine's device, weights as initialised."""
    config = model_to_hf(model, str(DTYPES[dtype]).removeprefix("torch."))
    model_type = config.pop("model_type")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        if model_type in MODELS:
            model_class = MODELS[model_type]
            return model_class(model_class.config_class(**config)).to(DTYPES[dtype])
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).to(DTYPES[dtype])


def _greedy(logits: Tensor) -> Tensor:
    return logits[:, -1:].argmax(-1)  # [b, 1]


def _is_ours(model: PreTrainedModel) -> bool:
    return isinstance(model, tuple(MODELS.values()))


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
