"""The list of findings. One is a function from the report's data to a row, or to None where the run has no data."""

from megatron_jet.evaluation.report import findings_models as models
from megatron_jet.evaluation.report import findings_placement as placement
from megatron_jet.evaluation.report.finding import Finding, Report

FINDINGS = (
    placement.learned_placement,
    placement.few_layers_matter,
    placement.joint_optimum,
    placement.tasks_differ,
    models.known_blocks,
    models.new_block,
    models.dynamic_kernel,
    models.equal_cache,
    models.accuracy_kept,
)
# These depend on a clock, so the report keeps them under `measured`.
MEASURED_FINDINGS = (models.faster_with_context, models.equal_speed)


def findings(report: Report) -> list[Finding]:
    """Findings that two runs of one config agree on."""
    return [row for make in FINDINGS if (row := make(report)) is not None]


def measured_findings(report: Report) -> list[Finding]:
    """Findings about speed on this device."""
    return [row for make in MEASURED_FINDINGS if (row := make(report)) is not None]
