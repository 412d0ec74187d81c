"""Everything a run needs to go on after a restart, in atomic, reshardable checkpoints.

    checkpoints/step-00000050/model/           weights alone, in the format of every model checkpoint
                              state/           optimiser, random generators, and the plain values below (torch_dist)
                              complete.json    written last: step, config hash, layout, size of every file

A directory gets its final name only when complete. Newer checkpoints that turn out broken are passed over.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.configs.training import TrainingConfig
from megatron_jet.model.state import CHECKPOINT_METADATA, sharded_state
from megatron_jet.training.checkpoint import load_model, load_sharded, root_cause, save_model, save_sharded
from megatron_jet.training.collectives import all_ranks, from_rank_0, on_rank_0
from megatron_jet.training.freezing import named_parameters
from megatron_jet.training.optimizer import Optimizer

log = logging.getLogger(__name__)

KEEP_LAST = 2
MARKER = "complete.json"


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


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: checkpoints/ of the job.
        config_hash: a checkpoint of another configuration is refused.
        model_config: kept beside the weights.
    """

    def __init__(self, path: Path, config_hash: str, model_config: dict[str, Any] | None = None):
        self.path = path
        self.config_hash = config_hash
        self.model_config = model_config

    def directory(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def best_directory(self, step: int) -> Path:
        return self.path / f"best-{step:08d}"

    def save(self, chunks: list[nn.Module], optimizer: Optimizer, progress: Progress, data_state: Any) -> Path:
        """Write a checkpoint of all ranks, then delete old ones.

        Returns:
            Its directory.

        Raises:
            UserError: it could not be written (disk full, say); the earlier ones are as they were.
        """
        final = self.directory(progress.step)
        temporary = self.path / f".{final.name}.partial"

        def write() -> None:
            save_model(chunks, temporary / "model", self.model_config)
            save_sharded(_state_to_save(chunks, optimizer, progress, data_state), temporary / "state")

        for action in (
            lambda: on_rank_0(lambda: _clear(temporary)),
            write,
            lambda: on_rank_0(lambda: self._finish(temporary, final, progress.step)),
        ):
            self._attempt(action, final, temporary)
        return final

    def save_best(self, chunks: list[nn.Module], step: int) -> Path:
        """Write weights alone, as the best so far."""
        final = self.best_directory(step)
        save_model(chunks, final, self.model_config)
        return final

    def load_latest(self, chunks: list[nn.Module], optimizer: Optimizer) -> tuple[Progress, list] | None:
        """Restore the newest complete checkpoint.

        Returns:
            Progress and the data states of the data-parallel ranks that saved it; None when there is no checkpoint.

        Raises:
            UserError: checkpoints of another configuration, or none of those present is complete.
        """
        found = from_rank_0(self._newest_complete() if dist.get_rank() == 0 else None)
        if isinstance(found, str):
            raise UserError(found)
        if found is None:
            return None
        directory, marker = found
        load_model(chunks, directory / "model")
        progress, data_states = _load_state(chunks, optimizer, directory / "state", marker)
        return progress, data_states

    def prune(self, best_step: int | None) -> None:
        """Keep the last checkpoints and the best weights."""
        on_rank_0(lambda: self._prune(best_step))

    def _prune(self, best_step: int | None) -> None:
        for old in self._steps()[:-KEEP_LAST]:
            _remove(old)
        for best in self.path.glob("best-*"):
            if best_step is None or best != self.best_directory(best_step):
                _remove(best)

    def _steps(self) -> list[Path]:
        return sorted(self.path.glob("step-*"))

    def _newest_complete(self) -> tuple[Path, dict] | str | None:
        """(directory, marker), None without checkpoints, or what is wrong."""
        problems = []
        for directory in reversed(self._steps()):
            problem, marker = check_complete(directory)
            if problem:
                log.warning("%s is not usable: %s", directory, problem)
                problems.append(f"{directory.name}: {problem}")
            elif marker["config_hash"] != self.config_hash:
                return f"{directory} belongs to another configuration; delete {self.path} or use another directory"
            else:
                return directory, marker
        return (
            f"{self.path}: no usable checkpoint ({'; '.join(problems)}); delete it to start over" if problems else None
        )

    def _attempt(self, action: Callable[[], None], final: Path, temporary: Path) -> None:
        """Run a part of saving on all ranks; when it fails on any, clean up and raise the same error on all."""
        problem = None
        try:
            action()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # whatever went wrong, ranks must agree on it
            problem = root_cause(error)
        problem = next((p for p in all_ranks(problem) if p), None)
        if problem is None:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        kept = self._steps()
        state = f"{kept[-1].name} is intact" if kept else "there is no earlier one"
        raise UserError(f"checkpoint {final} could not be written: {problem}; {state}. Fix this and run again")

    def _finish(self, temporary: Path, final: Path, step: int) -> None:
        sizes = {str(f.relative_to(temporary)): f.stat().st_size for f in temporary.rglob("*") if f.is_file()}
        write_json(
            temporary / MARKER,
            {"step": step, "config_hash": self.config_hash, "layout": _layout(), "files": sizes},
        )
        _replace(temporary, final)


def check_complete(directory: Path) -> tuple[str | None, dict]:
    """(What is wrong with a checkpoint directory or None, its marker)."""
    if not (directory / MARKER).exists():
        return f"{MARKER} is missing", {}
    marker = read_json(directory / MARKER)
    for name, size in marker["files"].items():
        path = directory / name
        if not path.exists():
            return f"{name} is missing", marker
        if path.stat().st_size != size:
            return f"{name} is truncated ({path.stat().st_size} of {size} bytes)", marker
    return None, marker


def _state_to_save(chunks, optimizer: Optimizer, progress: Progress, data_state: Any) -> dict:
    """The sharded state dict of everything but the weights. Collective."""
    steps = _gathered_adam_steps(chunks, optimizer)
    data_states = dict(all_ranks((parallel_state.get_data_parallel_rank(), data_state)))
    with optimizer.common_step():
        optimizer_state = optimizer.megatron.sharded_state_dict(sharded_state(chunks), metadata=_metadata())
    return {
        "optimizer": optimizer_state,
        "rng": _rng_object(_rng_state()),
        "progress": asdict(progress),
        "adam_steps": steps,
        "data": [state for _, state in sorted(data_states.items())],
    }


def _load_state(chunks, optimizer: Optimizer, path: Path, marker: dict) -> tuple[Progress, list]:
    with optimizer.common_step():
        wanted = {
            "optimizer": optimizer.megatron.sharded_state_dict(
                sharded_state(chunks), is_loading=True, metadata=_metadata()
            )
        }
    same_layout = marker["layout"] == _layout()
    if same_layout:
        wanted["rng"] = _rng_object(None)
    loaded = load_sharded(wanted, path)
    steps = {parameter: loaded["adam_steps"].get(name) for name, parameter in named_parameters(chunks)}
    optimizer.load_state_dict(loaded["optimizer"], steps)
    if same_layout:
        _set_rng_state(loaded["rng"])
    return Progress(**loaded["progress"]), loaded["data"]


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


def _layout() -> dict[str, int]:
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


def _clear(temporary: Path) -> None:
    """An empty folder to write to. What an earlier, killed save left there goes."""
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "state").mkdir(parents=True)


def _remove(directory: Path) -> None:
    """Delete an old checkpoint, or as much of it as goes: NFS keeps .nfs* files while somebody has one open. What is
    left is tried again after the next save, and training goes on."""
    problems: list[str] = []
    shutil.rmtree(directory, onexc=lambda function, path, error: problems.append(f"{path}: {error}"))
    if problems:
        log.warning("%s could not be deleted (%s)", directory, problems[0])


def _replace(temporary: Path, final: Path) -> None:
    """Give a complete directory its name. One of that name is from a run that was killed later; it goes."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
