"""The worker pool itself: results by rank, errors with tracebacks, hangs that end, a new start afterwards."""

import time

import pytest
import torch
import torch.distributed as dist

from megatron_jet.configs.training import ParallelConfig
from pool import WorkerFailure


def rank_sum(offset: float) -> tuple[int, int, float]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def groups() -> tuple[int, int]:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has a problem")
    dist.barrier()


def hang() -> None:
    time.sleep(1000)


def test_results_come_back_by_rank(pool):
    assert pool.run(rank_sum, 0.5, world_size=2) == [(0, 2, 2.0), (1, 2, 2.0)]


def test_layout_is_set_up(pool):
    assert pool.run(groups, layout=ParallelConfig(tensor=2, pipeline=2)) == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_failures_and_hangs_are_reported_and_survived(pool):
    with pytest.raises(WorkerFailure, match="rank 1 has a problem"):
        pool.run(fail_on_rank_1, world_size=2)
    with pytest.raises(WorkerFailure, match="in hang"):
        pool.run(hang, world_size=2, timeout=2)
    assert pool.run(rank_sum, 0.0, world_size=2)[0] == (0, 2, 1.0)
