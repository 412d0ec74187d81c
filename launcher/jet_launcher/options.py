"""The options of `run` and `resume`, and the check of a config's inputs that both start with."""

from dataclasses import dataclass
from pathlib import Path

from jet_launcher.forecast import check_layout
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.teacher_source import resolve_teacher, teacher_model


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


def check_inputs(config: RunConfig) -> ModelConfig:
    """Shape of the teacher, after checking that teacher, data and layout fit. Raises UserError."""
    resolve_teacher(config.teacher)
    teacher = teacher_model(config.teacher)
    data = Path(config.data.path)
    if config.data.path != "bundled" and not (data / "index.json").is_file():
        raise UserError(f"data.path={data}: no index.json there; make it with tools/prepare_data.py")
    check_layout(config, teacher)
    return teacher
