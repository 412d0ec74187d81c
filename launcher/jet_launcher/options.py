"""The options of `run` and `resume`, and the check of a config's inputs that both start with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.errors import UserError, usage_errors
from megatron_jet.configs.layout import check_layout
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.teacher_source import resolve_teacher, teacher_model, tokenizer_directory
from megatron_jet.data.checks import bundled_index, check_data, repeated_sources
from megatron_jet.data.index import read_index


@dataclass(frozen=True)
class LaunchOptions:
    """The options of `run` beside recipe and overrides.

    Attributes:
        cluster: name or file; None: where the run was before.
        wait: on a cluster, stay until the jobs have ended.
    """

    cluster: str | None
    stages: str | None
    output: Path | None
    root: Path
    dryrun: bool
    as_json: bool
    wait: bool = False


@usage_errors()
def check_inputs(config: RunConfig) -> ModelConfig:
    """Shape of the teacher, after checking that teacher, data and layout fit, and that the data have what every stage
    of the config reads: a job must not find out after days of training. Raises UserError."""
    resolve_teacher(config.teacher)
    teacher = teacher_model(config.teacher)
    check_layout(config, teacher)
    tokenizer = tokenizer_directory(config.teacher)
    if config.data.path == "bundled":
        index = bundled_index(teacher, tokenizer)
    elif not (Path(config.data.path) / "index.json").is_file():
        raise UserError(f"data.path={config.data.path}: no index.json there; make it with tools/prepare_data.py")
    else:
        index = read_index(config.data.path)
    check_data(config, index, teacher, tokenizer)
    return teacher


def inputs_problem(config: RunConfig) -> str | None:
    """What keeps a run from starting here; None: nothing. For a dry run, which goes on without its inputs."""
    try:
        check_inputs(config)
    except UserError as error:
        return str(error)
    return None


def data_notes(config: RunConfig, stages: Sequence[str]) -> list[str]:
    """What to know about the data before the stages start, one line each. The inputs are checked already."""
    if config.data.path == "bundled":
        return []
    return repeated_sources(config, read_index(config.data.path), stages)
