"""One optimiser step or one validation pass through Megatron's pipeline schedules."""

from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_jet.training.distill import TERMS, Normalizer

Batch = dict[str, Tensor]
MODEL_INPUTS = ("tokens", "labels", "loss_mask")


def take_batches(loader: Iterator[Batch], count: int) -> list[Batch]:
    """The micro-batches of one step, on the device. Every rank of a model replica reads the same ones."""
    return [{key: to_device(batch[key]) for key in MODEL_INPUTS} for batch in islice(loader, count)]


def to_device(tensor: Tensor) -> Tensor:
    """Copy to the GPU from pinned memory, without which the copy would not overlap with what the GPU is doing."""
    if not torch.cuda.is_available():
        return tensor
    return tensor.pin_memory().to(torch.cuda.current_device(), non_blocking=True)


def normalizer(batches: list[Batch]) -> Normalizer:
    """Token counts of these micro-batches over all data-parallel ranks, which may have unequal numbers of answers."""
    counts = torch.stack(
        [
            torch.stack([batch["loss_mask"].float().sum() for batch in batches]).sum(),
            torch.tensor(float(sum(batch["tokens"].numel() for batch in batches)), device=batches[0]["tokens"].device),
        ]
    ).double()
    group = parallel_state.get_data_parallel_group()
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    scored, tokens = counts.tolist()
    return Normalizer(tokens=tokens, scored=max(scored, 1.0))


def run_microbatches(chunks: list[nn.Module], batches: list[Batch], norm: Normalizer, *, forward_only: bool) -> Tensor:
    """Forward, and unless `forward_only` backward with gradients reduced over all ranks.

    Args:
        chunks: DistillationModel chunks of this rank, wrapped for data parallelism when they train.
        batches: equal shapes.
        norm: token counts of the global batch.
        forward_only: no gradients.

    Returns:
        Feature, KL and cross-entropy per token [3], summed over all ranks.
    """
    models = [chunk if not hasattr(chunk, "ddp_config") else chunk.module for chunk in chunks]
    rows, seq_length = batches[0]["tokens"].shape
    streams = 2 if models[0].teacher is not None else 1  # the teacher's hidden state travels beside the student's
    several = len(chunks) > 1
    iterators = [iter(batches) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, norm=norm),
            data_iterator=iterators if several else iterators[0],
            model=chunks if several else chunks[0],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=rows * streams,
            forward_only=forward_only,
        )
    terms = sum(model.take_terms() for model in models)
    if dist.get_world_size() > 1:
        dist.all_reduce(terms)
    return terms


def named_terms(terms: Tensor) -> dict[str, float]:
    """[3] -> by name."""
    return dict(zip(TERMS, terms.tolist()))


def _forward_step(batches: Iterator[Batch], model: nn.Module, *, norm: Normalizer):
    return model(next(batches), norm), _loss


def _loss(output: Tensor) -> tuple[Tensor, Tensor, dict]:
    """What the schedule wants of the last stage: the loss, a token count (unused, see optimizer.py), a report."""
    return output, torch.zeros((), dtype=torch.int, device=output.device), {}
