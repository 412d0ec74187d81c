"""The largest batch that fits, found by trying."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from megatron_jet.configs.errors import UserError
from megatron_jet.evaluation.throughput.session import Load, Session


def largest_batch(fits: Callable[[int], bool], limit: int, first: int = 8) -> int:
    """Largest batch that fits, to within 1/16 of it.

    Args:
        fits: tries a batch size; one larger than a batch that does not fit must not fit either.
        limit: the largest to try.
        first: where to start.

    Returns:
        A batch size that was tried and fits.

    Raises:
        UserError: not even one sequence fits.
    """
    low, high = 0, limit + 1  # `low` fits, `high` does not
    batch = min(first, limit)
    while high - low > max(1, low // 16):
        if fits(batch):
            low = batch
        else:
            high = batch
        batch = min(2 * low, limit) if high > limit else (low + high) // 2
    if low == 0:
        raise UserError("not even a batch of one fits into memory; choose a shorter context or a smaller prefill chunk")
    return low


def session_fits(model: PreTrainedModel, load: Load, decode: str) -> bool:
    """Whether a session with this load has enough memory, found by opening it."""
    session = Session(model, load, decode)
    try:
        session.open()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # What the failed step holds is freed with the traceback, which the caller's frame must not keep.
        error.__traceback__ = None
        return False
    finally:
        session.close()
    return True


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that it followed from (ending a broken capture raises again), means no memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        # The driver and cuBLAS, which take memory past torch's allocator, say it in words.
        if "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
