"""Shared fixtures. Megatron's CPU support is installed before any test module imports Megatron."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import one_config  # noqa: E402
from megatron_jet.training import cpu_backend  # noqa: E402

cpu_backend.install()
if torch.cuda.is_available():
    one_config.install()  # tests ask whether numbers are right, and tuning takes a quarter of an hour

from pool import Nursery, WorkerPool  # noqa: E402

NURSERY = Nursery()


@pytest.fixture(scope="session")
def pool():
    """One pool of gloo workers for all distributed tests of the session."""
    workers = WorkerPool(NURSERY)
    yield workers
    workers.close()


@pytest.fixture
def single_rank():
    """A world of one process with one tensor- and pipeline-parallel rank."""
    from megatron_jet.configs.training import ParallelConfig
    from megatron_jet.training.parallel import destroy_parallel, init_parallel

    init_parallel(ParallelConfig(), seed=0)
    yield ParallelConfig()
    destroy_parallel()
