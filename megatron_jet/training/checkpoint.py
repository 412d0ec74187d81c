"""Model weights as a Megatron distributed checkpoint (torch_dist) that any layout can load."""

import contextlib
import logging
import os
import queue
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch_strategy
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_jet.configs.checksums import DamagedError
from megatron_jet.configs.directories import stop_if_interrupted
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_json
from megatron_jet.model.closed_pickle import closed_pickles
from megatron_jet.model.state import local_shards, sharded_state, unwrap
from megatron_jet.training.collectives import first_problem, on_rank_0, record_checksums, verify_checksums

COMPLETE_MARK = "metadata.json"  # written last by Megatron, so a directory without it is unfinished
MODEL_CONFIG = "model_config.json"


def save_model(chunks: list[nn.Module], path: str | Path, model_config: dict[str, Any] | None = None) -> None:
    """Write the weights of all ranks; `path` gets its name only when it is complete.

    Args:
        chunks: this rank's part of the model.
        path: directory to make; an existing one is replaced.
        model_config: kept beside the weights, for a reader that has nothing else.

    Raises:
        UserError: it cannot be written (disk full, no permission); an earlier checkpoint at `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    problem = _on_rank_0(lambda: _prepare(temporary))
    if problem is None:
        try:
            save_sharded(sharded_state(chunks), temporary)
            if model_config is not None:
                on_rank_0(lambda: write_json(temporary / MODEL_CONFIG, model_config))
            record_checksums(temporary)
        except OSError as error:
            problem = str(error)
    if problem is None:
        problem = _on_rank_0(lambda: _finish(temporary, path))
    if problem is not None:
        _on_rank_0(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise UserError(f"{path}: checkpoint cannot be written ({problem.splitlines()[0][:200]})")


def load_model(chunks: list[nn.Module], path: str | Path, strict: bool = True) -> None:
    """Load weights saved at any layout, in any dtype, into this rank's part of the model.

    Args:
        chunks: the model.
        path: a directory that `save_model` or the converter wrote.
        strict: model and checkpoint must have the same tensors. Otherwise those that both have are loaded.

    Raises:
        UserError: no such checkpoint, one that was not finished or is damaged, or tensors that do not fit; the message
            names one.
    """
    check_complete(path)
    verify_checksums(Path(path))
    stored = _read(
        lambda: dist_checkpointing.load_tensors_metadata(str(path)), Path(path), "checkpoint metadata cannot be read"
    )
    shapes = {shard.key: tuple(shard.global_shape) for shard in local_shards(chunks)}
    for key in sorted(set(shapes) & set(stored)):
        if shapes[key] != tuple(stored[key].global_shape):
            found = list(stored[key].global_shape)
            raise UserError(f"{path}: tensor '{key}' has shape {found}, the model needs {list(shapes[key])}")
    if strict:
        wanted = set().union(*_all_ranks(set(shapes)))
        for what, keys in (("misses", wanted - set(stored)), ("has more than the model:", set(stored) - wanted)):
            if keys:
                names = ", ".join(sorted(keys)[:3])
                raise UserError(f"{path}: checkpoint {what} {names}{' ...' if len(keys) > 3 else ''}")
    state = sharded_state(chunks)
    for tensors in state.values():
        for name in [name for name, shard in tensors.items() if not _keys_of(shard) <= set(stored)]:
            del tensors[name]
    loaded = _read(lambda: dist_checkpointing.load(state, str(path), validate_access_integrity=False), Path(path))
    for i, chunk in enumerate(chunks):
        # Extra states of Transformer Engine are not part of our checkpoints, and partial loads leave tensors out.
        unwrap(chunk).load_state_dict(loaded[f"model{i}"], strict=False)


def save_sharded(state: dict[str, Any], path: str | Path) -> None:
    """Megatron's synchronous save of any sharded state dict into an existing empty directory.

    Megatron hands the writer's results over through a manager process, which takes seconds to start and which only its
    asynchronous save needs. Here the writer is this process, so an ordinary queue does.

    Raises:
        OSError: some rank could not write; the message says why, on all ranks.
    """
    before = filesystem_async._results_queue
    logger = logging.getLogger(megatron_torch_strategy.__name__)
    level = logger.level
    filesystem_async._results_queue = queue.Queue()
    logger.setLevel(logging.ERROR)  # it warns that the asynchronous save underneath is deprecated
    problem = None
    try:
        with _writer_errors() as errors:
            dist_checkpointing.save(state, str(path))
    except (Exception, CheckpointException) as error:  # torch's exception is no Exception
        stop_if_interrupted(error)
        problem = (0, errors[0]) if errors else (1, root_cause(error))
    finally:
        filesystem_async._results_queue = before
        logger.setLevel(level)
    problems = [p for p in _all_ranks(problem) if p]
    if problems:
        raise OSError(min(problems)[1])


@contextlib.contextmanager
def _writer_errors() -> Iterator[list[str]]:
    """What the writer logs as errors: it passes on no more than their type."""
    logger = logging.getLogger(filesystem_async.__name__)
    errors: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            errors.append(record.getMessage().rpartition("error: ")[2].partition("] ")[2] or record.getMessage())
        return record.levelno < logging.ERROR

    logger.addFilter(note)
    try:
        yield errors
    finally:
        logger.removeFilter(note)


def load_sharded(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Megatron's load of any sharded state dict, without its warnings.

    Raises:
        DamagedError: it cannot be read.
    """
    return _read(lambda: dist_checkpointing.load(state, str(path)), Path(path))


def root_cause(error: BaseException) -> str:
    """The first error of a chain in one line: checkpoint libraries wrap the interesting one several times."""
    failures = getattr(error, "_failures", None)  # torch's error that gathers those of all ranks
    if failures:
        return root_cause(next(iter(failures.values()))[0])
    cause = error.__cause__ or error.__context__
    if cause is not None:
        return root_cause(cause)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def check_complete(path: str | Path) -> None:
    """Raise UserError unless `path` is a finished checkpoint."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint directory")
    if not (path / COMPLETE_MARK).is_file():
        raise UserError(f"{path}: not a complete Megatron checkpoint ({COMPLETE_MARK} is missing)")


def _read[T](action: Callable[[], T], path: Path, what: str = "checkpoint is damaged") -> T:
    """What `action` reads. Collective: when it fails on one rank, all raise DamagedError."""
    result, problem = None, None
    try:
        with _reading():
            result = action()
    except (Exception, CheckpointException) as error:  # torch raises many kinds, and the latter is not an Exception
        stop_if_interrupted(error)
        problem = root_cause(error)
    problem = first_problem(problem)
    if problem is not None:
        raise DamagedError(f"{path}: {what} ({problem})", path)
    return result


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Reading: nothing pickled is run. Megatron reads metadata outside the process group and by old argument order;
    torch warns of both."""
    with warnings.catch_warnings(), closed_pickles():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="The argument order of load has been changed")
        yield


def _keys_of(shard) -> set[str]:
    """Checkpoint keys of an entry of a sharded state dict; a fused tensor has one per section."""
    if not hasattr(shard, "build"):
        return {shard.key}
    return {part.key for part in _flatten(shard.build())}


def _flatten(parts) -> list:
    if isinstance(parts, dict):
        parts = list(parts.values())
    return [leaf for part in parts for leaf in _flatten(part)] if isinstance(parts, list) else [parts]


def _prepare(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _finish(temporary: Path, path: Path) -> None:
    """Put the finished directory in place; a kill in between leaves the old or the new one complete under some name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def _on_rank_0(action) -> str | None:
    """Run `action` on rank 0; its error message, or None, on all ranks."""
    problem = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem = error.strerror or str(error)
    box = [problem]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _all_ranks(value) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
