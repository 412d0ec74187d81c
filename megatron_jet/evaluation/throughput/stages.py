"""Throughput as the search and evaluate stages of a run ask for it: fixed contexts and batch, one model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.stages import ThroughputConfig
from megatron_jet.evaluation.throughput.models import check_positions, random_model
from megatron_jet.evaluation.throughput.protocol import rates, run_interleaved
from megatron_jet.evaluation.throughput.session import Load, Session, check_decode


@dataclass(frozen=True)
class Speed:
    """Tokens per second over the whole batch, by context length (as JSON keys: strings)."""

    generation: dict[str, float]
    prefill: dict[str, float]


def measure_generation(model: ModelConfig, settings: ThroughputConfig, dtype: str) -> Speed:
    """Time a model of this shape with random weights on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return measure_model(random_model(model, dtype, device), settings)


def measure_model(model: PreTrainedModel, settings: ThroughputConfig) -> Speed:
    """Time a loaded model at every context length of the settings.

    Each figure is the median over the iterations after the warm-up. On a CPU all contexts take part in every iteration,
    so that a slow spell of the machine does not fall on one of them alone; on a GPU, where memory is short and the
    clock is steady, one context after the other.

    Raises:
        UserError: a context the model has no positions for, or CUDA graphs without a GPU.
    """
    loads = [
        Load(context, settings.batch_size, settings.prefill_chunk, settings.new_tokens) for context in settings.contexts
    ]
    check_positions(model.config.max_position_embeddings, max(load.longest for load in loads), "throughput.contexts")
    check_decode(settings.decode, model.device, "throughput.decode=graph")
    model.eval()
    iterations = settings.warmup + settings.iterations
    turn = iterations if model.device.type == "cuda" else None
    timings = run_interleaved([Session(model, load, settings.decode) for load in loads], iterations, turn)
    found = {str(load.context): rates(rows, load, settings.warmup) for load, rows in zip(loads, timings)}
    return Speed(
        generation={context: rate.generation for context, rate in found.items()},
        prefill={context: rate.prefill for context, rate in found.items()},
    )
