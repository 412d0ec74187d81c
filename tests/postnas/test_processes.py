"""What ranks of a worker do together: waiting for rank 0 longer than for one another, through several layouts."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_jet.configs.signals import Interrupted
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.postnas import processes
from megatron_jet.training.parallel import destroy_parallel, parallel_session


def as_a_worker(port: int, work) -> object:
    """Pool worker: `work` inside `world()`, started as torchrun does; collectives give up after 2 s."""
    rank, size = dist.get_rank(), dist.get_world_size()
    destroy_parallel()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    timeout = processes.COLLECTIVE_TIMEOUT
    os.environ.update({name: str(value) for name, value in names.items()})
    processes.COLLECTIVE_TIMEOUT = timedelta(seconds=2)
    try:
        with processes.world():
            return work(rank)
    finally:
        processes.COLLECTIVE_TIMEOUT = timeout
        for name in names:
            del os.environ[name]


def slow_on_main(rank: int) -> tuple[object, list[int]]:
    """Rank 0 works for longer than the timeout, before and after a layout came and went."""

    def work() -> str:
        time.sleep(3)
        return "timed"

    with parallel_session(ParallelConfig(tensor=2), seed=0):
        inside = processes.on_main(work)
    if rank == 1:
        time.sleep(3)
    return inside, processes.gather(rank)


def collective_alone(rank: int) -> str:
    """The same wait in the world itself."""
    if rank == 0:
        time.sleep(4)
    try:
        dist.barrier()
    except RuntimeError as error:
        return str(error)
    return "met"


def run_slow_on_main(port: int):
    return as_a_worker(port, slow_on_main)


def run_collective_alone(port: int):
    return as_a_worker(port, collective_alone)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_ranks_wait_for_rank_0_longer_than_for_one_another(pool, port):
    assert pool.run(run_slow_on_main, port, world_size=2) == [("timed", [0, 1])] * 2


def test_a_rank_that_is_late_in_a_collective_counts_as_hung(pool, port):
    assert "imed out" in pool.run(run_collective_alone, port, world_size=2)[1]


def test_an_error_of_rank_0_is_raised_on_every_rank(pool, port):
    assert pool.run(run_failing_on_main, port, world_size=2) == ["not there", "not there"]


def failing_on_main(rank: int) -> str:
    def work() -> None:
        raise FileNotFoundError("not there")

    with pytest.raises(FileNotFoundError) as raised:
        processes.on_main(work)
    return str(raised.value)


def run_failing_on_main(port: int):
    return as_a_worker(port, failing_on_main)


def test_a_stop_of_rank_0_is_one_on_every_rank(pool, port):
    """The others would wait for its answer; what cannot be sent arrives in words."""
    assert pool.run(run_stopped_on_main, port, world_size=2) == [("stopped by SIGTERM", "Local: closed")] * 2


def stopped_on_main(rank: int) -> tuple[str, str]:
    class Local(Exception):
        pass

    def stop() -> None:
        raise Interrupted("stopped by SIGTERM")

    def fail() -> None:
        raise Local("closed")

    with pytest.raises(Interrupted) as stopped:
        processes.on_main(stop)
    with pytest.raises(RuntimeError) as failed:
        processes.on_main(fail)
    return str(stopped.value), str(failed.value)


def run_stopped_on_main(port: int):
    return as_a_worker(port, stopped_on_main)
