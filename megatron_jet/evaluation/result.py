"""What `tools/evaluate.py` writes and reads back."""

from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_jet.configs.base import ResultModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import SCHEMA_VERSION, read_json
from megatron_jet.configs.results import Scores


class TaskResult(ResultModel):
    """One harness task or group."""

    metrics: dict[str, float] = Field(description='by the harness\'s names, such as "acc_norm,none"; fractions or nats')
    stderr: dict[str, float] = Field(default_factory=dict, description="standard errors, where the harness has them")
    num_fewshot: int | None = None
    samples: int | None = Field(default=None, description="questions answered; None for groups")
    version: str | None = Field(default=None, description="of the task in the harness")


class PresetResult(ResultModel):
    """One of the paper's groups."""

    score: float | None = Field(description="percent; None when a metric is missing")
    parts: dict[str, float | None] = Field(description="percent by task")
    comparable: str
    not_comparable: str


class EvaluationResult(ResultModel):
    """A whole evaluation. Clock figures sit under `measured`."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "evaluation"
    model: str
    harness: str = Field(description="version of lm-evaluation-harness")
    settings: dict[str, Any] = Field(description="limit, batch size, type, device, data")
    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    presets: dict[str, PresetResult] = Field(default_factory=dict)
    measured: dict[str, float] = Field(default_factory=dict, description="seconds")

    def scores(self) -> dict[str, float]:
        """Every number by one name, such as "tiny_recall accuracy" or "paper-mmlu"; presets in percent."""
        found = {name: preset.score for name, preset in self.presets.items() if preset.score is not None}
        for name, task in self.tasks.items():
            found |= {f"{name} {metric.removesuffix(',none')}": value for metric, value in task.metrics.items()}
        return found


def read_scores(path: str | Path) -> dict[str, float]:
    """Numbers of an earlier result, named as in `EvaluationResult.scores`.

    Args:
        path: of a file written by tools/evaluate.py, or the result.json of a run's evaluate stage (its final model).

    Raises:
        UserError: no such file, or neither of the two.
    """
    data = read_json(path)
    if isinstance(data, dict) and data.get("kind") == "evaluation":
        return EvaluationResult.parse(data, str(path)).scores()
    if isinstance(data, dict) and data.get("stage") == "evaluate" and "final" in data:
        final = Scores.parse(data["final"], f"{path}: final")
        return {
            f"tiny_{name} {metric}": value
            for metric in ("accuracy", "loss")
            for name, value in getattr(final, metric).items()
        }
    raise UserError(f"{path}: not a result of tools/evaluate.py nor of a run's evaluate stage")
