"""Small agreements between all ranks."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # of everything that ranks do together; a rank that is later counts as hung


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank: a signal may reach only some, and all must stop after the same step."""
    if dist.get_world_size() == 1:
        return flag
    tensor = torch.tensor(float(flag), device=torch.cuda.current_device())
    dist.all_reduce(tensor)
    return bool(tensor.item())


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on all ranks. What lies in a shared folder is looked at by one rank, so that none disagrees."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(action: Callable[[], None]) -> None:
    """Do something on rank 0 alone. When it fails, all ranks raise, so that none waits for the others for ever.

    Raises:
        OSError: on all ranks, what rank 0 met.
    """
    problem = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = error.strerror or str(error)
    problem = from_rank_0(problem)
    if problem is not None:
        raise OSError(problem)


def all_ranks(value: Any) -> list:
    """Every rank's value, in order."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
