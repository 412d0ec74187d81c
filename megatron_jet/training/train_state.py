"""What a run needs beside its weights to go on after a restart: optimiser, random generators, progress, data."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_jet.configs.training import TrainingConfig
from megatron_jet.model.state import CHECKPOINT_METADATA, sharded_state
from megatron_jet.training.checkpoint import load_sharded
from megatron_jet.training.collectives import all_ranks
from megatron_jet.training.freezing import named_parameters
from megatron_jet.training.optimizer import Optimizer


@dataclass
class Progress:
    """How far a run is. Plain values only; equal on all ranks."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    tail_steps: int = 0
    tail_sums: dict[str, float] = field(default_factory=dict)
    validation: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    seconds: float = 0.0
    step_seconds: float = 0.0

    def count_step(self, training: TrainingConfig, losses: dict[str, float] | None, seconds: float) -> None:
        """Add a step. `losses` None: it was skipped. The last tenth of the steps is summed up for the final losses."""
        self.step += 1
        self.tokens += training.global_batch_size * training.seq_length
        self.step_seconds += seconds
        if losses is None:
            self.skipped += 1
        elif self.step > training.steps - math.ceil(training.steps / 10):
            self.tail_steps += 1
            for key, value in losses.items():
                name = "total" if key == "loss" else key
                self.tail_sums[name] = self.tail_sums.get(name, 0.0) + value

    @property
    def final_losses(self) -> dict[str, float]:
        """Means over the last tenth of the steps."""
        return {name: total / self.tail_steps for name, total in self.tail_sums.items()}


def state_to_save(chunks, optimizer: Optimizer, progress: Progress, data_state: Any) -> dict:
    """The sharded state dict of everything but the weights. Collective."""
    steps = _gathered_adam_steps(chunks, optimizer)
    data_states = dict(all_ranks((parallel_state.get_data_parallel_rank(), data_state)))
    return {
        "optimizer": optimizer.sharded_state_dict(sharded_state(chunks), _metadata()),
        "rng": _rng_object(_rng_state()),
        "progress": asdict(progress),
        "adam_steps": steps,
        "data": [state for _, state in sorted(data_states.items())],
    }


def load_state(chunks, optimizer: Optimizer, path: Path, saved_layout: dict) -> tuple[Progress, list]:
    """Inverse of `state_to_save`: progress, and the data states of the data-parallel ranks that saved. Collective.

    Random generators are restored where the layout is the one that saved.
    """
    wanted = {"optimizer": optimizer.sharded_state_dict(sharded_state(chunks), _metadata(), loading=True)}
    same_layout = saved_layout == layout()
    if same_layout:
        wanted["rng"] = _rng_object(None)
    loaded = load_sharded(wanted, path)
    steps = {parameter: loaded["adam_steps"].get(name) for name, parameter in named_parameters(chunks)}
    optimizer.load_state_dict(loaded["optimizer"], steps)
    if same_layout:
        _set_rng_state(loaded["rng"])
    return Progress(**loaded["progress"]), loaded["data"]


def not_finite(chunks: list, optimizer: Optimizer | None = None) -> str | None:
    """Name of a tensor of this rank that holds a NaN or an infinity: of the weights and of the optimiser's state."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.isfinite().all():
                return name
    if optimizer is None:
        return None
    inner = optimizer.megatron.optimizer
    main = [tensor for group in inner.param_groups for tensor in group["params"]]
    moments = [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    bad = any(not tensor.isfinite().all() for tensor in (*main, *moments))
    return "the optimiser's state" if bad else None


def _metadata() -> dict:
    return {
        **CHECKPOINT_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def _gathered_adam_steps(chunks, optimizer: Optimizer) -> dict[str, float]:
    """Adam's step count by global parameter name. Paths of a supernet differ in it; Megatron saves only one."""
    own = {}
    for name, parameter in named_parameters(chunks):
        state = optimizer.state_of(parameter)
        if torch.is_tensor(state.get("step")):
            own[name] = float(state["step"])
    return {name: step for part in all_ranks(own) for name, step in part.items()}


def layout() -> dict[str, int]:
    """Of this process group; kept beside a checkpoint."""
    return {
        "world": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
    }


def _rng_state() -> dict:
    state = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _rng_object(state: dict | None) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)
