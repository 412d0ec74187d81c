"""The processes that run a stage together: a world for the length of a worker, and work that rank 0 does for all."""

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_jet.configs.ranks import environment_rank
from megatron_jet.training.collectives import COLLECTIVE_TIMEOUT

# How long ranks wait for one that works alone: rank 0 times generation, converts a model, or checks files for all.
PATIENCE = timedelta(hours=24)
_WAITING: ContextVar[dist.ProcessGroup | None] = ContextVar("waiting", default=None)  # the group they wait in


@contextmanager
def world() -> Iterator[None]:
    """Start torch.distributed when torchrun started several of us; a single process needs no world between layouts.

    Beside it, a group on gloo for `on_main` and `gather`. In NCCL, a rank that waits longer than its timeout aborts the
    job, and whoever works alone may need longer; a rank that died ends the waiting at once.
    """
    if dist.is_initialized() or environment_rank()[1] == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    waiting = _WAITING.set(dist.new_group(backend="gloo", timeout=PATIENCE))
    # Who took part, for whoever reads the logs of many nodes. One write: processes of a node share a log.
    print(f"rank {rank()} of {world_size()} on {socket.gethostname()} ({dist.get_backend()})\n", end="", flush=True)
    try:
        yield
    finally:
        _WAITING.reset(waiting)
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_main[T](function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and give its result to every rank; an exception, or a stop, is raised on every rank."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome = [function(), None]
        except BaseException as error:  # a stop signal as well: the others would wait for an answer
            outcome = [None, _portable(error)]
    dist.broadcast_object_list(outcome, src=0, group=_WAITING.get())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def gather[T](value: T) -> list[T]:
    """Every rank's value, on every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_WAITING.get())
    return values
