"""Config of each PostNAS stage (Jet-Nemotron paper, section 2). What the paper does not publish is a field here."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import ParallelConfig, TrainingConfig

# Every stage in the order of a run, and the object that does it (module:name), as text: the launcher reads this list
# without torch. A new stage is its file and a line here.
STAGES = {
    "prepare": "megatron_jet.postnas.prepare:PREPARE",
    "placement": "megatron_jet.postnas.placement:PLACEMENT",
    "block_selection": "megatron_jet.postnas.selection:BLOCK_SELECTION",
    "new_block": "megatron_jet.postnas.selection:NEW_BLOCK",
    "hardware_search": "megatron_jet.postnas.selection:HARDWARE_SEARCH",
    "stage1": "megatron_jet.postnas.training_stages:STAGE1",
    "stage2": "megatron_jet.postnas.training_stages:STAGE2",
    "export": "megatron_jet.postnas.export:EXPORT",
    "evaluate": "megatron_jet.postnas.evaluate:EVALUATE",
    "report": "megatron_jet.postnas.report:REPORT",
}
STAGE_ORDER = tuple(STAGES)
SELECTION_STAGES = ("block_selection", "new_block", "hardware_search")
SEARCH_STAGES = ("placement", *SELECTION_STAGES)


class EvalConfig(StrictModel):
    """How many samples of each eval set score a candidate."""

    samples: int = Field(default=32, gt=0, description="sequences per task")
    batch_size: int = Field(default=16, gt=0)


class StageResources(StrictModel):
    """What one stage asks of a cluster, and the paper's figures next to it."""

    nodes: int = Field(default=1, ge=1)
    parallel: ParallelConfig | None = Field(default=None, description="None: the run's own layout")
    paper_gpu_hours: float | None = Field(default=None, description="H100-hours in the paper")


class ThroughputConfig(StrictModel):
    """How generation throughput is obtained: timed on this device with the HF model, or from the cost formulas."""

    mode: Literal["measured", "analytic"] = Field(
        default="measured", description="which one ranks; the formulas' does not depend on how busy a machine is"
    )
    also_timed: bool = Field(
        default=False, description="with mode analytic: time it here as well, for the report; it decides nothing"
    )
    contexts: tuple[int, ...] = (1024,)
    batch_size: int = Field(
        default=1, gt=0, description="sequences; on a GPU each model runs the largest batch up to this that fits"
    )
    prefill_chunk: int = Field(default=2048, gt=0)
    new_tokens: int = Field(default=16, gt=0)
    iterations: int = Field(default=6, gt=0, description="dropped ones included")
    dropped: int = Field(default=1, ge=0, description="first iterations that do not count")
    decode: Literal["auto", "eager", "graph"] = Field(default="auto", description="auto: CUDA graphs on a GPU")
    tie: float = Field(default=0.03, ge=0, description="relative difference under which two throughputs count as equal")

    @model_validator(mode="after")
    def _something_counts(self) -> "ThroughputConfig":
        if self.dropped >= self.iterations:
            raise UserError(f"throughput: dropped={self.dropped} of iterations={self.iterations} leaves none")
        return self

    @property
    def timed(self) -> bool:
        """Whether models run on this device for it."""
        return self.mode == "measured" or self.also_timed


class PlacementConfig(StrictModel):
    """Once-for-all supernet, heat map, beam search for full attention, then sliding-window placement."""

    resources: StageResources = StageResources()
    training: TrainingConfig
    linear: str = Field(default="gla", description="mixer of the linear path; the paper used GLA")
    full_layers: dict[int, float] = Field(description="weight of each number of full layers drawn per step")
    budget: int = Field(default=2, ge=0, description="full-attention layers to place")
    objective: str = Field(default="recall", description="eval set whose accuracy places the full layers")
    beam_width: int = Field(default=3, ge=1)
    swa_budget: int = Field(default=0, ge=0)
    swa_window: int = Field(default=64, ge=1)
    swa_objective: str = Field(default="choice", description="eval set whose loss places the sliding windows")
    uniform_phase: float = Field(default=0.5, ge=0, lt=1, description="the uniform baseline, fixed beforehand")
    compare_training: TrainingConfig | None = Field(
        default=None, description="short stage 1 of the learned placement and of others; None: no comparison"
    )
    comparison: Literal["declared", "all"] = Field(
        default="all",
        description="the others: the uniform baseline alone, or every uniform placement and no full attention as well",
    )
    eval: EvalConfig = EvalConfig()
    init: Literal["teacher", "random"] = "teacher"

    @model_validator(mode="after")
    def _weights(self) -> "PlacementConfig":
        if not self.full_layers or any(w < 0 for w in self.full_layers.values()) or not sum(self.full_layers.values()):
            raise UserError("placement.full_layers: give non-negative weights, at least one above 0")
        return self


class CandidateStageConfig(StrictModel):
    """Candidates trained with the same tokens under the placement found, then ranked."""

    resources: StageResources = StageResources()
    training: TrainingConfig
    candidates: tuple[str, ...] = Field(min_length=1, description="names in `mixers`, or 'jet_static'")
    throughput: ThroughputConfig = ThroughputConfig()
    eval: EvalConfig = EvalConfig()
    init: Literal["teacher", "random"] = "teacher"
    keep_checkpoints: bool = False


class GridPoint(StrictModel):
    """One row of the hardware-aware grid: per-head key and value width, and heads."""

    d_k: int = Field(gt=0)
    d_v: int = Field(gt=0)
    heads: int = Field(gt=0)

    @property
    def name(self) -> str:
        """The candidate's name, also in job and file names."""
        return f"{self.d_k}x{self.d_v}x{self.heads}"

    @property
    def state_size(self) -> int:
        """Elements of recurrent state per layer."""
        return self.d_k * self.d_v * self.heads


class HardwareSearchConfig(StrictModel):
    """Grid over d_k, d_v and heads at constant state size (paper table 2)."""

    resources: StageResources = StageResources()
    training: TrainingConfig
    mixer: str | None = Field(default=None, description="mixer to resize; None: the winner of new_block")
    grid: tuple[GridPoint, ...] = Field(min_length=1)
    expected: str | None = Field(
        default=None, description="point of the grid that forecasts count on; None: the mixer's sizes as they are"
    )
    throughput: ThroughputConfig = ThroughputConfig()
    eval: EvalConfig = EvalConfig()
    init: Literal["teacher", "random"] = "teacher"
    keep_checkpoints: bool = False

    @model_validator(mode="after")
    def _constant_state(self) -> "HardwareSearchConfig":
        sizes = {point.state_size for point in self.grid}
        if len(sizes) > 1:
            raise UserError(f"hardware_search.grid: d_k*d_v*heads must be constant, got {sorted(sizes)}")
        names = [point.name for point in self.grid]
        if self.expected is not None and self.expected not in names:
            raise UserError(
                f"hardware_search.expected: '{self.expected}' is not in the grid; it has {', '.join(names)}"
            )
        return self


class TrainStageConfig(StrictModel):
    """Stage 1 (MLPs frozen, distillation) or stage 2 (full model)."""

    resources: StageResources = StageResources()
    training: TrainingConfig
    eval: EvalConfig = EvalConfig()
    init: Literal["search", "teacher"] = Field(
        default="teacher", description="stage1 only: 'search' continues the winner of hardware_search"
    )
    blend: dict[str, float] | None = Field(
        default=None, description="sampling weight per source in this stage; None: data.blend"
    )


class ExportConfig(StrictModel):
    """Format of the exported weights."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    shard_bytes: int = Field(default=4 << 30, gt=0)


class EvaluateConfig(StrictModel):
    """Final comparison of teacher and export, both as HF models."""

    eval: EvalConfig = EvalConfig()
    throughput: ThroughputConfig = ThroughputConfig()
