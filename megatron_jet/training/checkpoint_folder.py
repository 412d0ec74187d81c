"""The checkpoints of a run: atomic, reshardable, complete or passed over.

    checkpoints/step-00000050/model/           weights alone, in the format of every model checkpoint
                              state/           optimiser, random generators, and the plain values below (torch_dist)
                              complete.json    written last: step, config hash, layout, size of every file

A directory gets its final name only when complete. Newer checkpoints that turn out broken are passed over.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json, write_json
from megatron_jet.training.checkpoint import load_model, root_cause, save_model, save_sharded
from megatron_jet.training.collectives import all_ranks, from_rank_0, on_rank_0
from megatron_jet.training.optimizer import Optimizer
from megatron_jet.training.train_state import Progress, layout, load_state, state_to_save

log = logging.getLogger(__name__)

KEEP_LAST = 2
MARKER = "complete.json"


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
            save_sharded(state_to_save(chunks, optimizer, progress, data_state), temporary / "state")

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
        progress, data_states = load_state(chunks, optimizer, directory / "state", marker["layout"])
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
            {"step": step, "config_hash": self.config_hash, "layout": layout(), "files": sizes},
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
