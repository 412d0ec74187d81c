"""What each stage writes to result.json. The report, the launcher and later stages read nothing else.

Every figure that depends on a clock sits under a `measured` key; two runs of one config are equal outside of them.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from megatron_jet.configs.base import ResultModel
from megatron_jet.configs.files import SCHEMA_VERSION
from megatron_jet.configs.model import ModelConfig

Context = Annotated[str, Field(pattern=r"^[0-9]{1,12}$")]  # length in tokens, as JSON has keys


def _inside(path: str) -> str:
    """A run may come from anywhere, and what its results name is read, kept or cleaned away."""
    if not path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"'{path[:200]}' lies outside the run directory")
    return path


InRun = Annotated[str, AfterValidator(_inside)]  # a path relative to the run directory


class Scores(ResultModel):
    """Held-out or search-split scores of one model. Losses are nats per scored token."""

    accuracy: dict[str, float] = Field(description="by eval set: recall, choice, copy")
    loss: dict[str, float] = Field(description="by eval set: recall, choice, copy, text")
    error: dict[str, float] = Field(default_factory=dict, description="standard error of the accuracy, over sequences")
    sequences: dict[str, int] = Field(
        default_factory=dict,
        description="sequences with answers scored; a split may have fewer than asked for",
    )


class Measured(ResultModel):
    """Clock figures of a stage or candidate."""

    seconds: float
    train_tokens_per_second: float | None = None
    generation_tokens_per_second: dict[Context, float] | None = Field(default=None, description="by context length")
    prefill_tokens_per_second: dict[Context, float] | None = Field(default=None, description="by context length")
    extra: dict[str, Any] = Field(default_factory=dict)


def _described(value: dict[str, Any]) -> dict[str, Any]:
    """What is stored as a plain mapping is a model that can be read back."""
    ModelConfig.parse(value)
    return value


StoredModel = Annotated[dict[str, Any], AfterValidator(_described)]


class StageResult(ResultModel):
    """Base of every stage's result."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    inputs_hash: str
    tokens: int = Field(default=0, description="training tokens spent")
    measured: Measured


class PrepareResult(StageResult):
    """Teacher imported into a Megatron checkpoint, data prepared."""

    teacher_path: str = Field(description="HF directory, or 'bundled:tiny', as in the config")
    teacher_checkpoint: InRun = Field(description="relative to the run directory")
    teacher_config: StoredModel = Field(description="ModelConfig")
    data_path: str
    tokenizer_path: str
    teacher_hash: str = Field(description="of config.json and the weights")
    data_index_hash: str
    sources: list[str]


class PlacementScore(ResultModel):
    """One placement of full-attention layers and its scores."""

    full: tuple[int, ...]
    scores: Scores


class BeamRound(ResultModel):
    """One round of the beam search: all candidates scored, and which were kept."""

    candidates: list[PlacementScore]
    kept: list[tuple[int, ...]]


class ComparisonRow(ResultModel):
    """One architecture on held-out data, straight from the supernet and after a short stage 1."""

    name: str = Field(description="learned, uniform, uniform phase k, all_linear, all_full")
    full: tuple[int, ...]
    before: Scores
    after: Scores | None = None


class PlacementResult(StageResult):
    """Placement found, and all the evidence for it."""

    full: tuple[int, ...]
    swa: tuple[int, ...]
    swa_window: int
    plan: tuple[str, ...] = Field(description="layer plan with the supernet's linear mixer")
    objective: str
    swa_objective: str
    heat_map: list[PlacementScore] = Field(description="one layer full, the others linear; search split")
    all_linear: Scores
    all_full: Scores
    beam: list[BeamRound]
    swa_beam: list[BeamRound] = Field(description="here `full` lists sliding-window layers")
    uniform: tuple[int, ...]
    comparison: list[ComparisonRow] = Field(description="held-out split")
    layer_forwards: int = Field(description="done, thanks to shared prefixes")
    layer_forwards_naive: int
    final_losses: dict[str, float]


class CandidateResult(ResultModel):
    """One trained candidate of a selection stage."""

    name: str
    mixer: str
    mixer_config: dict[str, Any]
    params: int
    state_bytes: int = Field(description="cache bytes of one linear layer per sequence")
    analytic_flops_per_token: float
    scores: Scores
    final_losses: dict[str, float]
    tokens: int = Field(description="training tokens; also of an equal candidate whose result was reused")
    analytic_tokens_per_second: dict[str, float] = Field(description="by context, from the cost formulas")
    recipe_hash: str = Field(description="of everything that decides the result; equal candidates are trained once")
    reused_from: str | None = Field(default=None, description="stage that trained an equal candidate")
    ablation: bool = Field(default=False, description="shown for comparison, cannot win")
    measured: Measured


class SelectionResult(StageResult):
    """block_selection, new_block and hardware_search: candidates, ranking, winner, and the rule used."""

    candidates: list[CandidateResult]
    ranking: list[str]
    winner: str
    winner_mixer: str
    winner_config: dict[str, Any]
    rule: str
    pareto: list[str] = Field(default_factory=list, description="names on the accuracy / throughput front")


class TrainStageResult(StageResult):
    """stage1 and stage2."""

    plan: tuple[str, ...]
    model_config_: StoredModel = Field(alias="model", description="ModelConfig")
    checkpoint: InRun = Field(description="relative to the run directory")
    final_losses: dict[str, float]
    validation: list[dict[str, float]] = Field(description="step and held-out losses at each validation")
    before: Scores
    after: Scores

    model_config = ResultModel.model_config | {"populate_by_name": True}


class ExportResult(StageResult):
    """HF directory written."""

    path: InRun = Field(description="relative to the run directory")
    model_type: str
    files: dict[str, str] = Field(description="sha256 by file name")
    max_logit_difference: float = Field(description="export against the Megatron model, fp32, same tokens")


class EvaluateResult(StageResult):
    """Teacher and export side by side, both as HF models on held-out data."""

    teacher: Scores
    final: Scores
    megatron: Scores = Field(description="the final model scored on the Megatron side; must equal `final`")
    teacher_params: int
    final_params: int
    teacher_cache_bytes: dict[Context, int] = Field(description="by context")
    final_cache_bytes: dict[Context, int] = Field(description="by context")
    teacher_measured: Measured
    final_measured: Measured


RESULT_TYPES: dict[str, type[StageResult]] = {
    "prepare": PrepareResult,
    "placement": PlacementResult,
    "block_selection": SelectionResult,
    "new_block": SelectionResult,
    "hardware_search": SelectionResult,
    "stage1": TrainStageResult,
    "stage2": TrainStageResult,
    "export": ExportResult,
    "evaluate": EvaluateResult,
}


def result_type(stage: str) -> type[StageResult]:
    """What a stage's result.json holds; stages without a row above have nothing beyond `StageResult`."""
    return RESULT_TYPES.get(stage, StageResult)
