"""Throughput as the search and evaluate stages of a run ask for it: fixed contexts, one model.

A figure that cannot be had (a cache that fits at no batch size) is left out; it never ends a stage whose training took
days.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.stages import ThroughputConfig
from megatron_jet.evaluation.throughput.batch_search import is_out_of_memory, largest_batch, session_fits
from megatron_jet.evaluation.throughput.models import random_model
from megatron_jet.evaluation.throughput.protocol import rates, run_interleaved
from megatron_jet.evaluation.throughput.session import Load, Session, Timing, check_decode


@dataclass(frozen=True)
class Speed:
    """By context length (as JSON keys: strings). Contexts that fit into memory at no batch size are missing.

    Attributes:
        generation: tokens per second over the whole batch.
        prefill: the same.
        batch_size: sequences that were run.
    """

    generation: dict[str, float]
    prefill: dict[str, float]
    batch_size: dict[str, int]


def measure_generation(model: ModelConfig, settings: ThroughputConfig, dtype: str) -> Speed:
    """Time a model of this shape with random weights on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return measure_model(random_model(model, dtype, device), settings)


def measure_model(model: PreTrainedModel, settings: ThroughputConfig) -> Speed:
    """Time a loaded model at every context length of the settings.

    Each figure is the median over the iterations after the dropped ones. On a CPU all contexts take part in every
    iteration, so that a slow spell of the machine does not fall on one of them alone. On a GPU, where memory is short
    and the clock is steady, one context follows the other, each with the largest batch up to the asked one that fits.

    Contexts may be longer than the model has positions, as in the paper (64K tokens for a teacher that was made for
    32K): positions are computed, not looked up, and speed does not depend on what comes out.

    Raises:
        UserError: CUDA graphs without a GPU.
    """
    loads = [
        Load(context, settings.batch_size, settings.prefill_chunk, settings.new_tokens) for context in settings.contexts
    ]
    check_decode(settings.decode, model.device, "throughput.decode=graph")
    model.eval()
    if model.device.type == "cuda":
        fits = partial(session_fits, model, decode=settings.decode)
        runs = [fitting_run(load, lambda fitting: _time(model, [fitting], settings)[0], fits) for load in loads]
    else:
        runs = list(zip(loads, _time(model, loads, settings)))
    found = {str(load.context): (load, rates(rows, load, settings.dropped)) for load, rows in filter(None, runs)}
    return Speed(
        generation={context: rate.generation for context, (_, rate) in found.items()},
        prefill={context: rate.prefill for context, (_, rate) in found.items()},
        batch_size={context: load.batch_size for context, (load, _) in found.items()},
    )


def fitting_run(
    load: Load, run: Callable[[Load], list[Timing]], fits: Callable[[Load], bool]
) -> tuple[Load, list[Timing]] | None:
    """Run a load, or what is left of it when it needs more memory than there is.

    Args:
        load: as asked for.
        run: times a load.
        fits: opens a session with a load and closes it again.

    Returns:
        What was run and its timings; None when not even a single sequence fits.
    """
    while True:
        try:
            return load, run(load)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler, so that nothing holds on to the memory of what failed.
        if load.batch_size == 1:
            return None
        limit = load.batch_size * 7 // 8
        try:
            batch = largest_batch(lambda size, load=load: fits(replace(load, batch_size=size)), limit, first=limit)
        except UserError:
            return None
        load = replace(load, batch_size=batch)


def _time(model: PreTrainedModel, loads: list[Load], settings: ThroughputConfig) -> list[list[Timing]]:
    """Timings of each load, all taking part in every iteration."""
    sessions = [Session(model, load, settings.decode) for load in loads]
    return run_interleaved(sessions, settings.iterations)
