"""What a stage is: its inputs, its work, its place in the run directory, and pieces of work that survive a kill."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_jet.configs.attempts import leave_if_superseded
from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_written, write_checked
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.results import PrepareResult, StageResult, result_type
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.training import DataConfig, ParallelConfig
from megatron_jet.postnas.processes import on_main
from megatron_jet.postnas.status import StageStatus

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageContext:
    """Where a stage runs.

    Attributes:
        run_dir: run directory.
        config: the resolved config.
        status: of the running stage; written on rank 0.
    """

    run_dir: Path
    config: RunConfig
    status: StageStatus = field(default_factory=StageStatus)

    def stage_dir(self, stage: str) -> Path:
        return self.run_dir / "stages" / stage

    def result(self, stage: str) -> Any:
        """Result of a finished stage. Raises UserError when there is none, or one that was changed since."""
        path = self.stage_dir(stage) / "result.json"
        if not path.is_file():
            raise UserError(f"stage '{stage}' has not finished in {self.run_dir}; run it first (--stages {stage})")
        try:
            return result_type(stage).parse(read_written(path), str(path))
        except UserError as error:
            raise UserError(f"{error}; run stage '{stage}' again (--stages {stage})") from None

    def upstream(self, stage: str) -> dict[str, Any]:
        """A finished stage's result as input of another: everything but clock figures."""
        return strip_measured(self.result(stage).to_dict())

    def relative(self, path: Path) -> str:
        """A path as results store it: relative to the run directory where it lies inside, so that runs can be moved."""
        path = Path(path)
        return str(path.relative_to(self.run_dir)) if path.is_relative_to(self.run_dir) else str(path)

    def path(self, stored: str) -> Path:
        """Inverse of `relative`."""
        return self.run_dir / stored

    def layout(self, stage: str) -> ParallelConfig:
        """Parallel layout of a stage's training."""
        settings = self.config.stage(stage)
        return getattr(settings.resources, "parallel", None) or self.config.parallel

    @property
    def prepared(self) -> PrepareResult:
        return self.result("prepare")

    @property
    def teacher(self) -> ModelConfig:
        """Shape of the teacher."""
        return ModelConfig.parse(self.prepared.teacher_config, "prepare result")

    @property
    def teacher_checkpoint(self) -> Path:
        return self.path(self.prepared.teacher_checkpoint)

    @property
    def data(self) -> DataConfig:
        """The data config with the prepared directory in place."""
        return self.config.data.replace(path=str(self.path(self.prepared.data_path)))

    def training_data(self, stage: str) -> DataConfig:
        """`data` with the blend of this stage, where it has its own."""
        blend = getattr(self.config.stage(stage), "blend", None)
        return self.data if blend is None else self.data.replace(blend=blend)


class Stage(Protocol):
    """One step of PostNAS. A new one is a file with such an object and a line in catalog.py.

    Attributes:
        name: as in STAGE_ORDER.
        kept: entries of its directory that changed inputs do not make worthless.
    """

    name: str
    kept: tuple[str, ...]

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        """Everything the result depends on, as JSON: settings, and results of earlier stages without clock figures."""

    def run(self, ctx: StageContext, inputs_hash: str) -> StageResult:
        """Do the work; collective over all ranks. What is done twice after a kill must come out the same."""


def common_inputs(ctx: StageContext, stage: str, *upstream: str) -> dict[str, Any]:
    """Inputs that every stage has. How many processes share the work is not one of them."""
    settings = ctx.config.stage(stage)
    return {
        "seed": ctx.config.seed,
        "dtype": ctx.config.dtype,
        "blend": ctx.config.data.to_dict(),
        "settings": None if settings is None else {k: v for k, v in settings.to_dict().items() if k != "resources"},
        "upstream": {name: ctx.upstream(name) for name in upstream},
    }


def strip_measured(value: Any) -> Any:
    """A copy of a JSON value without anything under a key `measured` (or `..._measured`)."""
    if isinstance(value, dict):
        return {k: strip_measured(v) for k, v in value.items() if k != "measured" and not k.endswith("_measured")}
    if isinstance(value, list | tuple):
        return [strip_measured(item) for item in value]
    return value


def persisted[M: StrictModel](path: Path, kind: type[M], compute: Callable[[], M]) -> M:
    """The result of a piece of work, from its file where a run before this one finished it. Collective.

    Args:
        path: JSON file; lies in the stage's directory, which is emptied when the stage's inputs change.
        kind: what the file holds.
        compute: the work, run on all ranks; its value must be equal on all ranks.
    """
    stored = on_main(lambda: _stored(path, kind))
    if stored is not None:
        return stored
    value = compute()
    on_main(lambda: write_result(path, value))
    return value


def write_result(path: Path, value: StrictModel) -> None:
    """Keep the result of some work, unless another attempt at it has taken over. Rank 0 only."""
    leave_if_superseded()
    write_checked(path, value.to_dict())


def _stored[M: StrictModel](path: Path, kind: type[M]) -> M | None:
    """The piece of work in a file; None, with a line that says why, where it is not what was written."""
    try:
        return read_model(path, kind) if os.path.lexists(path) else None
    except UserError as error:
        log.warning("%s; done again", error)
        return None


def read_model[M: StrictModel](path: Path, kind: type[M]) -> M:
    """What `persisted` wrote. Raises UserError for anything else."""
    stored = read_written(path)
    stored.pop("schema_version", None)
    return kind.parse(stored, str(path))


def clear_directory(directory: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove everything in a directory but the entries named."""
    for entry in directory.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
