"""report: report.html and report.json from the results of all stages."""

from typing import Any

from megatron_jet.configs.files import hash_json, read_written
from megatron_jet.configs.results import Measured, StageResult
from megatron_jet.configs.stages import STAGE_ORDER
from megatron_jet.evaluation.report.build import build_report
from megatron_jet.postnas.processes import on_main
from megatron_jet.postnas.stage import StageContext, strip_measured


class ReportStage:
    """See the module's docstring."""

    name = "report"
    kept = ()

    def inputs(self, ctx: StageContext) -> dict[str, Any]:
        paths = {stage: ctx.stage_dir(stage) / "result.json" for stage in STAGE_ORDER if stage != self.name}
        return {stage: hash_json(strip_measured(read_written(path))) for stage, path in paths.items() if path.is_file()}

    def run(self, ctx: StageContext, inputs_hash: str) -> StageResult:
        on_main(lambda: build_report(ctx.run_dir))
        return StageResult(stage=self.name, inputs_hash=inputs_hash, measured=Measured(seconds=ctx.status.seconds))


REPORT = ReportStage()
