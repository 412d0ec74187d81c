"""The config of a whole run: one object, resolved once, written to the run directory as config.yaml."""

from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from megatron_jet.configs.base import StrictModel
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.layer_plan import LayerPlan, linear_kinds
from megatron_jet.configs.mixers.base import MixerConfig
from megatron_jet.configs.mixers.registry import typed_mixers
from megatron_jet.configs.stages import (
    SEARCH_STAGES,
    SELECTION_STAGES,
    STAGE_ORDER,
    CandidateStageConfig,
    EvaluateConfig,
    ExportConfig,
    HardwareSearchConfig,
    PlacementConfig,
    TrainStageConfig,
)
from megatron_jet.configs.training import DataConfig, ParallelConfig


class TeacherConfig(StrictModel):
    """The pre-trained full-attention model, an HF directory."""

    path: str = Field(min_length=1, description="HF directory, or 'bundled:tiny'")
    tokenizer: str | None = Field(
        default=None, min_length=1, description="HF directory of the tokenizer; None: the teacher's"
    )


class RunConfig(StrictModel):
    """Everything a PostNAS run depends on. Equal configs give equal results outside `measured`."""

    recipe: str = Field(min_length=1, description="name of the recipe it came from")
    # The seeds of layers, ranks and epochs are worked out from it, and all of them fit into 64 bits.
    seed: int = Field(default=0, ge=0, lt=2**32)
    teacher: TeacherConfig
    data: DataConfig
    mixers: dict[str, MixerConfig] = Field(description="sizes of every candidate mixer")
    nproc: int = Field(default=1, ge=1, description="processes per node of every distributed stage")
    parallel: ParallelConfig = ParallelConfig()
    dtype: Literal["fp32", "bf16"] = "fp32"
    stages: tuple[str, ...] = Field(default=STAGE_ORDER, min_length=1)
    student_plan: LayerPlan | None = Field(
        default=None,
        min_length=1,
        description="mixer of every layer, for runs that train a known architecture; None: search for it",
    )
    placement: PlacementConfig
    block_selection: CandidateStageConfig
    new_block: CandidateStageConfig
    hardware_search: HardwareSearchConfig
    stage1: TrainStageConfig
    stage2: TrainStageConfig
    verify_checkpoints: bool = Field(
        default=True,
        description="look at the checksums of a checkpoint before it is read",
    )
    watchdog_seconds: float = Field(
        default=600.0, ge=0, description="a process that has not moved for so long ends the job; 0: never"
    )
    export: ExportConfig = ExportConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @field_validator("mixers", mode="before")
    @classmethod
    def _typed_mixers(cls, value: Any) -> dict[str, MixerConfig]:
        return typed_mixers(value)

    @field_serializer("mixers")
    def _plain_mixers(self, mixers: dict[str, MixerConfig]) -> dict[str, Any]:
        return {kind: mixer.to_dict() for kind, mixer in mixers.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        for stage in self.stages:
            if stage not in STAGE_ORDER:
                raise UserError(f"stages: unknown stage '{stage}'; known: {', '.join(STAGE_ORDER)}")
        resized = self.hardware_search.mixer
        for where, names, suffix in (
            ("placement.linear", (self.placement.linear,), ""),
            ("block_selection.candidates", self.block_selection.candidates, "_static"),
            ("new_block.candidates", self.new_block.candidates, "_static"),
            ("hardware_search.mixer", () if resized is None else (resized,), ""),
        ):
            for name in names:
                if name.removesuffix(suffix) not in self.mixers:
                    raise UserError(f"{where}: '{name}' has no entry in mixers; known: {', '.join(self.mixers)}")
        if self.student_plan is not None:
            self._check_known_architecture(self.student_plan)
        elif self._continues_search and not any(stage in SELECTION_STAGES for stage in self.stages):
            raise UserError(
                f"stage1.init=search continues the winner of a selection stage ({', '.join(SELECTION_STAGES)}), and "
                "stages has none; set stage1.init=teacher with it"
            )
        return self

    @property
    def _continues_search(self) -> bool:
        return "stage1" in self.stages and self.stage1.init == "search"

    def _check_known_architecture(self, plan: LayerPlan) -> None:
        for kind in linear_kinds(plan):
            if kind not in self.mixers:
                raise UserError(f"student_plan: '{kind}' has no entry in mixers; known: {', '.join(self.mixers)}")
        if any(stage in SEARCH_STAGES for stage in self.stages):
            rest = ",".join(stage for stage in self.stages if stage not in SEARCH_STAGES)
            raise UserError(f"student_plan leaves nothing to search for; set stages=[{rest}] with it")
        if self.stage1.init == "search":
            raise UserError("student_plan leaves no search to continue; set stage1.init=teacher with it")

    def stage(self, name: str) -> Any:
        """Config of one stage. Raises UserError for an unknown name."""
        if name not in STAGE_ORDER:
            raise UserError(f"unknown stage '{name}'; known: {', '.join(STAGE_ORDER)}")
        return getattr(self, name, None)
