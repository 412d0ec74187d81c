"""A run directory: making one, continuing one, finding one by its ID."""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jet_launcher.usage import usage_errors
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import describe_os_error, read_json, write_text
from megatron_jet.configs.lock import exclusive
from megatron_jet.configs.overrides import dump_yaml, load_yaml
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import STAGE_ORDER
from megatron_jet.configs.upstream import check_upstream

DEFAULT_ROOT = Path("runs")
_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside a run directory. Making the object touches nothing."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.resolve().name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def provenance_file(self) -> Path:
        return self.path / "provenance.json"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    def locked(self) -> AbstractContextManager[int]:
        """Hold this run's lock; `exclusive` says what it gives and raises."""
        return exclusive(self.lock_file, f"wait for it, or `cancel {self.id}`")

    @property
    def log_file(self) -> Path:
        """Output of the worker before its first stage."""
        return self.path / "log.txt"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    def stage(self, name: str) -> Path:
        return self.path / "stages" / name

    def config(self) -> RunConfig:
        """The resolved config. Raises UserError when it is missing or does not parse."""
        return RunConfig.parse(load_yaml(self.config_file), str(self.config_file))

    def provenance(self) -> dict[str, Any]:
        """provenance.json, or an empty one when the run has none."""
        return read_json(self.provenance_file) if self.provenance_file.is_file() else {"launches": []}


def open_run(config: RunConfig, output: Path | None, root: Path = DEFAULT_ROOT) -> RunDirectory:
    """Make the directory of a run, or continue the one that is there.

    Args:
        output: the directory; None makes `root/<recipe>-<time>`.

    Raises:
        UserError: `output` holds something else, or a run whose config differs (the differing keys are named); or it
            cannot be written.
    """
    run = RunDirectory(output if output is not None else _new_path(config, root))
    check_directory(config, run)
    try:
        if not run.config_file.exists():
            write_text(run.config_file, dump_yaml(config))
    except OSError as error:
        raise UserError(describe_os_error(error, run.path)) from None
    return run


@usage_errors()
def check_directory(config: RunConfig, run: RunDirectory) -> None:
    """Raise UserError unless `run` is new, empty, or holds this very config. Writes nothing."""
    if run.config_file.is_file():
        differences = differing_keys(run.config().to_dict(), config.to_dict())
        if differences:
            shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
            more = len(differences) - _SHOWN_DIFFERENCES
            raise UserError(
                f"{run.path} holds a run with another config: {shown}{f'; and {more} more' if more > 0 else ''}. "
                "Give another --output, or the same values to continue it"
            )
    elif run.path.is_dir() and any(run.path.iterdir()):
        raise UserError(f"{run.path} exists, is not empty and is not a run directory; give another --output")
    elif run.path.exists() and not run.path.is_dir():
        raise UserError(f"{run.path} is a file; give a directory as --output")


def safe_name(recipe: str) -> str:
    """A recipe's name as part of a directory's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", recipe).strip("-.") or "run"


def differing_keys(there: Any, here: Any, prefix: str = "") -> list[str]:
    """`key (value there, value here)` for every leaf that differs between two plain configs."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = list(there) + [key for key in here if key not in there]
        parts = [
            differing_keys(there.get(key), here.get(key), f"{prefix}.{key}" if prefix else str(key)) for key in keys
        ]
        return [line for part in parts for line in part]
    return [] if there == here else [f"{prefix} ({there} there, {here} here)"]


@usage_errors()
def find_run(run_id: str, root: Path = DEFAULT_ROOT) -> RunDirectory:
    """The run with this ID: a path, or a name under `root`.

    Raises:
        UserError: there is none.
    """
    for path in (Path(run_id), root / run_id):
        if (path / "config.yaml").is_file():
            return RunDirectory(path)
    known = [run.id for run in list_runs(root)]
    hint = f"; known: {', '.join(known[-5:])}" if known else ""
    raise UserError(f"no run '{run_id}' here or in {root}/{hint}")


def list_runs(root: Path = DEFAULT_ROOT) -> list[RunDirectory]:
    """Runs under `root`, oldest first."""
    configs = sorted(root.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    return [RunDirectory(path.parent) for path in configs]


@usage_errors()
def choose_stages(config: RunConfig, names: str | None) -> tuple[str, ...]:
    """The stages to run, in order. `prepare` always comes along: every stage needs it, and it is done once.

    Raises:
        UserError: an unknown stage, or an empty list.
    """
    if names is None:
        return tuple(stage for stage in STAGE_ORDER if stage in config.stages)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError(f"--stages is empty; known: {', '.join(STAGE_ORDER)}")
    for name in wanted:
        config.stage(name)
    if wanted != ["report"]:
        wanted.append("prepare")
    return tuple(stage for stage in STAGE_ORDER if stage in wanted)


@usage_errors()
def check_upstream_results(config: RunConfig, stages: tuple[str, ...], path: Path | None) -> None:
    """Raise UserError when a stage needs another that is neither among `stages` nor finished in the run at `path`."""
    run = RunDirectory(path) if path is not None else None
    check_upstream(config, stages, lambda stage: run is not None and (run.stage(stage) / "result.json").is_file())


def _new_path(config: RunConfig, root: Path) -> Path:
    stem = f"{safe_name(config.recipe)}-{datetime.now():%Y%m%d-%H%M%S}"
    path, count = root / stem, 1
    while path.exists():
        count += 1
        path = root / f"{stem}-{count}"
    return path
