"""The stages, in order. Adding one: its file, its config and result type, its name in STAGE_ORDER, one line below."""

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.stages import STAGE_ORDER
from megatron_jet.postnas.evaluate import EvaluateStage
from megatron_jet.postnas.export import ExportStage
from megatron_jet.postnas.placement import PlacementStage
from megatron_jet.postnas.prepare import PrepareStage
from megatron_jet.postnas.report import ReportStage
from megatron_jet.postnas.selection import BLOCK_SELECTION, HARDWARE_SEARCH, NEW_BLOCK
from megatron_jet.postnas.stage import Stage
from megatron_jet.postnas.training_stages import STAGE1, STAGE2

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        PrepareStage(),
        PlacementStage(),
        BLOCK_SELECTION,
        NEW_BLOCK,
        HARDWARE_SEARCH,
        STAGE1,
        STAGE2,
        ExportStage(),
        EvaluateStage(),
        ReportStage(),
    )
}


def stage_named(name: str) -> Stage:
    """A stage by name. Raises UserError for an unknown one."""
    if name not in STAGES:
        raise UserError(f"unknown stage '{name}'; known: {', '.join(STAGE_ORDER)}")
    return STAGES[name]
