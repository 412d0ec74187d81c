"""Process groups and seeds of one layout. Can be set up and taken down many times in one process."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.ranks import environment_rank
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.training.collectives import COLLECTIVE_TIMEOUT


def init_parallel(
    parallel: ParallelConfig,
    seed: int,
    *,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> None:
    """Start torch.distributed (NCCL on GPUs, gloo on CPUs), Megatron's groups and the random generators.

    Without arguments the process group comes from the environment (torchrun's RANK, WORLD_SIZE, MASTER_ADDR); with
    none there, it is a world of one that opens no port.

    Args:
        parallel: the layout.
        seed: seeds torch equally on all ranks, and Megatron's per-rank generators.
        store: a rendezvous store, with `rank` and `world_size`.
        timeout: after which a collective that hangs fails.

    Raises:
        UserError: the layout does not fit the world size, or context parallelism is asked for.
    """
    if rank is None:
        rank, world_size = environment_rank()
    if parallel.context > 1:
        raise UserError("parallel.context: context parallelism is not supported yet; use context=1")
    parallel.data_parallel(world_size)
    # Megatron overlaps tensor-parallel communication by launch order, which one hardware queue keeps (up to Hopper).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        if store is None and "MASTER_ADDR" not in os.environ:
            if world_size > 1:
                raise UserError("WORLD_SIZE is above 1 but MASTER_ADDR is not set; start the processes with torchrun")
            store = dist.HashStore()
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "nccl"
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy_parallel() -> None:
    """Undo `init_parallel`. Safe when it did not run or failed half-way."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def parallel_session(parallel: ParallelConfig, seed: int) -> Iterator[None]:
    """`init_parallel` for the length of a block.

    A torch.distributed world that was there before stays, with its groups, so that a worker can go through several
    layouts; torchrun's store cannot serve two worlds of one process after each other.
    """
    own_world = not dist.is_initialized()
    groups_before = [] if own_world else list(dist.distributed_c10d._world.pg_map)
    excepthook = sys.excepthook  # init_process_group wraps it anew each time, to print "[rank0]:" before every line
    init_parallel(parallel, seed)
    try:
        yield
    finally:
        sys.excepthook = excepthook
        if own_world:
            destroy_parallel()
        else:
            parallel_state.destroy_model_parallel()  # forgets its groups but leaves them and their threads alive
            for group in [g for g in dist.distributed_c10d._world.pg_map if g not in groups_before]:
                dist.destroy_process_group(group)
