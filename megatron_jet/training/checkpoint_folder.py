"""The checkpoints of a run: atomic, reshardable, complete or passed over.

    checkpoints/step-00000050/model/           weights alone, in the format of every model checkpoint
                              state/           optimiser, random generators, and the plain values below (torch_dist)
                              complete.json    written last: step, config hash, layout, size of every file

model/ and state/ hold the checksums of their files (configs/checksums.py), and complete.json its own. A directory gets
its final name only when complete. Newer checkpoints that turn out broken in any file are passed over with a line, and
made anew. Weights or optimiser state that are not finite are not saved.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron_jet.configs.checksums import DamagedError
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_json, read_json_object, write_json
from megatron_jet.training.checkpoint import load_model, root_cause, save_model, save_sharded
from megatron_jet.training.collectives import (
    first_problem,
    from_rank_0,
    on_rank_0,
    record_checksums,
    verify_checksums,
)
from megatron_jet.training.optimizer import Optimizer
from megatron_jet.training.train_state import Progress, layout, load_state, not_finite, state_to_save

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
        self._good: set[int] = set()  # steps whose checkpoint this process has written or read

    def holds(self, step: int) -> bool:
        """Whether a checkpoint of this step is there and known to be good."""
        return step in self._good

    def directory(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"

    def best_directory(self, step: int) -> Path:
        return self.path / f"best-{step:08d}"

    def save(self, chunks: list[nn.Module], optimizer: Optimizer, progress: Progress, data_state: Any) -> Path:
        """Write a checkpoint of all ranks, then delete old ones.

        Returns:
            Its directory.

        Raises:
            UserError: it could not be written (disk full, say), or holds numbers that are not finite; the earlier ones
                are as they were.
        """
        self._refuse_not_finite(not_finite(chunks, optimizer), progress.step)
        final = self.directory(progress.step)
        temporary = self.path / f".{final.name}.partial"

        def write() -> None:
            save_model(chunks, temporary / "model", self.model_config)
            save_sharded(state_to_save(chunks, optimizer, progress, data_state), temporary / "state")
            record_checksums(temporary / "state")

        for action in (
            lambda: on_rank_0(lambda: _clear(temporary)),
            write,
            lambda: on_rank_0(lambda: self._finish(temporary, final, progress.step)),
        ):
            self._attempt(action, final, temporary)
        self._good.add(progress.step)
        return final

    def save_best(self, chunks: list[nn.Module], step: int) -> Path:
        """Write weights alone, as the best so far. Raises UserError as `save` does."""
        self._refuse_not_finite(not_finite(chunks), step)
        final = self.best_directory(step)
        save_model(chunks, final, self.model_config)
        return final

    def load_latest(self, chunks: list[nn.Module], optimizer: Optimizer) -> tuple[Progress, list] | None:
        """Restore the newest good checkpoint; newer ones are passed over with a line that says why. Collective.

        Returns:
            Progress and the data states of the data-parallel ranks that saved it; None when there is no checkpoint.

        Raises:
            UserError: checkpoints of another configuration, or none of those present is good.
        """
        steps = from_rank_0(list(reversed(self._steps())) if dist.get_rank() == 0 else None)
        problems = []
        for directory in steps:
            problem, marker = from_rank_0(check_complete(directory) if dist.get_rank() == 0 else None)
            if problem is None and marker["config_hash"] != self.config_hash:
                raise UserError(
                    f"{directory} belongs to another configuration; delete {self.path} or use another directory"
                )
            if problem is None:
                try:
                    restored, problem = self._load(directory, marker, chunks, optimizer), None
                except DamagedError as error:  # on this rank; perhaps not on the others
                    problem = str(error)
                problem = first_problem(problem)
            if problem is None:
                self._good.add(marker["step"])
                return restored
            problems.append(f"{directory.name}: {problem}")
            if dist.get_rank() == 0:
                log.warning("%s is not usable and passed over: %s", directory, problem)
        if problems:
            raise UserError(f"{self.path}: no usable checkpoint ({'; '.join(problems)}); delete it to start over")
        return None

    def _load(self, directory: Path, marker: dict, chunks: list[nn.Module], optimizer: Optimizer):
        """Progress and data states of one checkpoint. Raises DamagedError, before or after some of it is loaded."""
        verify_checksums(directory / "state")
        load_model(chunks, directory / "model")
        return load_state(chunks, optimizer, directory / "state", marker["layout"])

    def prune(self, step: int, best_step: int | None) -> None:
        """Keep the last checkpoints up to `step`, which was just saved, and the best weights."""
        on_rank_0(lambda: self._prune(step, best_step))

    def _prune(self, step: int, best_step: int | None) -> None:
        newest = self.directory(step)
        good = [path for path in self._steps() if path <= newest]  # later ones were passed over: broken
        for old in sorted({*self._steps()} - {*good[-KEEP_LAST:]}):
            _remove(old)
        for best in self.path.glob("best-*"):
            if best_step is None or best != self.best_directory(best_step):
                _remove(best)

    def _steps(self) -> list[Path]:
        return sorted(self.path.glob("step-*"))

    def _refuse_not_finite(self, found: str | None, step: int) -> None:
        """Raise UserError on all ranks when one has found a tensor that is not finite."""
        found = first_problem(found)
        if found is None:
            return
        raise UserError(
            f"{self.path.parent}: step {step}: {found} is not finite, so no checkpoint is saved; {self._intact()}. Run "
            "again to go on from there; if it happens again, lower optimizer.lr"
        )

    def _intact(self) -> str:
        kept = self._steps()
        return f"{kept[-1].name} is intact" if kept else "there is no earlier one"

    def _attempt(self, action: Callable[[], None], final: Path, temporary: Path) -> None:
        """Run a part of saving on all ranks; when it fails on any, clean up and raise the same error on all."""
        problem = None
        try:
            action()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # whatever went wrong, ranks must agree on it
            problem = root_cause(error)
        problem = first_problem(problem)
        if problem is None:
            return
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier()
        raise UserError(f"checkpoint {final} could not be written: {problem}; {self._intact()}. Fix this and run again")

    def _finish(self, temporary: Path, final: Path, step: int) -> None:
        sizes = {str(f.relative_to(temporary)): f.stat().st_size for f in temporary.rglob("*") if f.is_file()}
        marker = {"step": step, "config_hash": self.config_hash, "layout": layout(), "files": sizes}
        write_json(temporary / MARKER, {**marker, "hash": hash_json(marker)})
        _replace(temporary, final)


def check_complete(directory: Path) -> tuple[str | None, dict]:
    """(What is wrong with a checkpoint directory at first sight or None, its marker)."""
    if not (directory / MARKER).exists():
        return f"{MARKER} is missing", {}
    try:
        marker = read_json_object(directory / MARKER)
    except UserError as error:
        return str(error), {}
    own = {key: marker.get(key) for key in ("step", "config_hash", "layout", "files")}
    odd = None in own.values() or not isinstance(own["files"], dict)
    if odd or marker.get("hash", hash_json(own)) != hash_json(own):
        return f"{MARKER} is not what was written", {}
    for name, size in own["files"].items():
        path = directory / name
        if not path.exists():
            return f"{name} is missing", own
        if path.stat().st_size != size:
            return f"{name} is truncated ({path.stat().st_size} of {size} bytes)", own
    return None, own


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
