"""Megatron on a CPU: the version check, the named random states, and layouts set up again and again."""

import importlib.metadata

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.training import cpu_backend
from megatron_jet.training.parallel import destroy_parallel, init_parallel


def test_another_megatron_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(UserError, match="megatron-core 0.20.0 is installed, 0.19.2 is needed"):
        cpu_backend.install()


def test_another_megatron_is_refused_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu_backend.install()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(UserError, match="0.19.2 is needed"):
        cpu_backend.install()


def test_a_missing_megatron_is_refused(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UserError, match="not installed"):
        cpu_backend.install()


def test_installing_twice_changes_nothing():
    before = (torch.zeros, torch.Tensor.to, torch.cuda.current_device)
    cpu_backend.install()
    assert before == (torch.zeros, torch.Tensor.to, torch.cuda.current_device)


def test_cuda_literals_mean_the_cpu():
    """Also in the backward pass, where recomputation runs."""
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(1).to("cuda:0").cuda().device.type == "cpu"
    assert torch.ones(1).to(torch.device("cuda"), torch.float64).dtype == torch.float64

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad + torch.ones(1, device="cuda")

    x = torch.zeros(1, requires_grad=True)
    Backward.apply(x).backward()
    assert x.grad.item() == 2.0


def test_meta_device_still_works():
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"


def test_named_random_states_are_apart(single_rank):
    """Draws inside a fork neither follow nor move the generator outside; nested forks keep both states."""
    tracker = get_cuda_rng_tracker()
    torch.manual_seed(5)
    outside = torch.rand(3)
    torch.manual_seed(5)
    first = torch.rand(1)
    with tracker.fork():
        inside = torch.rand(2)
        with tracker.fork("data-parallel-rng"):
            torch.rand(7)
        inside_again = torch.rand(2)
    assert torch.equal(torch.cat([first, torch.rand(2)]), outside)
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    with get_cuda_rng_tracker().fork():
        assert torch.equal(torch.rand(4), torch.cat([inside, inside_again]))
    with pytest.raises(ValueError, match="not added"), tracker.fork("no such state"):
        pass


def test_layouts_follow_each_other_in_one_process():
    for seed in (1, 2):
        init_parallel(ParallelConfig(), seed=seed)
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(seed)))
        destroy_parallel()
        assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()
    destroy_parallel()  # without anything to undo


def test_a_layout_that_does_not_fit_the_world_is_refused():
    with pytest.raises(UserError, match="1 processes do not divide by tensor\\*pipeline=2"):
        init_parallel(ParallelConfig(tensor=2), seed=0)
    assert not dist.is_initialized()


def test_many_processes_need_a_rendezvous(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        init_parallel(ParallelConfig(tensor=2), seed=0)


def seeds() -> tuple[float, float]:
    outside = torch.rand(1).item()
    with get_cuda_rng_tracker().fork():
        return outside, torch.rand(1).item()


def test_ranks_share_the_seed_and_differ_inside_forks(pool):
    first, second = pool.run(seeds, layout=ParallelConfig(tensor=2), seed=11)
    assert first[0] == second[0] and first[1] != second[1]
