"""Everything the report shows, as one JSON-able dict. docs/report.md lists the keys.

Whatever depends on a clock or on the machine sits under a key `measured`: two runs of one config agree on the rest.
"""

import time
from pathlib import Path
from typing import Any

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import (
    SCHEMA_VERSION,
    hash_json,
    measured_seconds,
    read_json_object,
    read_written,
)
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.provenance import read_provenance
from megatron_jet.configs.results import EvaluateResult, Scores, StageResult, result_type
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import SELECTION_STAGES, STAGE_ORDER
from megatron_jet.evaluation.report.curves import read_curves
from megatron_jet.evaluation.report.findings import findings, measured_findings

TRAINING_STAGES = ("stage1", "stage2")
PENDING, DONE = "pending", "done"


def collect(run_dir: Path) -> dict[str, Any]:
    """Read the results of a run, finished or not.

    Raises:
        UserError: no config.yaml, or a result file that cannot be read; names the file.
    """
    config = RunConfig.parse(load_yaml(run_dir / "config.yaml"), str(run_dir / "config.yaml"))
    results = read_results(run_dir)
    stages = [
        _stage_row(run_dir, stage, results.get(stage)) for stage in STAGE_ORDER if _wanted(config, stage, results)
    ]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "recipe": config.recipe,
        "seed": config.seed,
        "dtype": config.dtype,
        "nproc": config.nproc,
        "student_plan": list(config.student_plan) if config.student_plan is not None else None,
        "config_hash": hash_json(config.to_dict()),
        "complete": all(row["state"] == DONE for row in stages),
        "stages": stages,
        "teacher": _teacher(results),
        "final": _final(results),
        "comparison": _comparison(results.get("evaluate")),
        "placement": _plain(results.get("placement")),
        **{stage: _selection(config, stage, results.get(stage)) for stage in SELECTION_STAGES},
        **{stage: _training(results.get(stage)) for stage in TRAINING_STAGES},
        "export": _export(results),
        "samples": {stage: _samples(config, stage) for stage in ("placement", *SELECTION_STAGES, "evaluate")},
        "steps": _steps(config),
        "curves": read_curves(run_dir),
    }
    report["findings"] = findings(report)
    report["measured"] = {
        "run": run_dir.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": sum(row["measured"]["seconds"] for row in stages if row["measured"]["seconds"] is not None),
        "findings": measured_findings(report),
        "provenance": _provenance(run_dir),
    }
    return report


def read_results(run_dir: Path) -> dict[str, StageResult]:
    """Results of all finished stages. Raises UserError that names a file which is not what it should be."""
    results = {}
    for stage in STAGE_ORDER:
        path = run_dir / "stages" / stage / "result.json"
        if path.is_file():
            results[stage] = result_type(stage).parse(read_written(path), str(path))
    return results


def _wanted(config: RunConfig, stage: str, results: dict[str, StageResult]) -> bool:
    """Stages to list: those of the config and others that have run, without the one that writes this."""
    return stage != "report" and (stage in config.stages or stage in results)


def _stage_row(run_dir: Path, stage: str, result: StageResult | None) -> dict[str, Any]:
    status_path = run_dir / "stages" / stage / "status.json"
    try:
        status = read_json_object(status_path)
    except UserError:
        status = {}  # there is none, or it is being replaced at this moment
    state = DONE if result is not None else str(status.get("state", PENDING))
    seconds = result.measured.seconds if result is not None else measured_seconds(status)
    row = {"stage": stage, "state": state, "tokens": result.tokens if result is not None else None}
    return {**row, "measured": {"seconds": seconds}}


def _plain(result: StageResult | None) -> dict[str, Any] | None:
    """A result without the bookkeeping."""
    if result is None:
        return None
    return {k: v for k, v in result.to_dict().items() if k not in ("schema_version", "stage", "inputs_hash")}


def _teacher(results: dict[str, StageResult]) -> dict[str, Any] | None:
    prepare, evaluate = results.get("prepare"), results.get("evaluate")
    if prepare is None:
        return None
    model = prepare.teacher_config
    return {
        "plan": list(model["layer_plan"]),
        "hidden_size": model["hidden_size"],
        "num_layers": model["num_layers"],
        "params": evaluate.teacher_params if evaluate is not None else None,
    }


def _final(results: dict[str, StageResult]) -> dict[str, Any] | None:
    """The furthest model so far: after stage 2, else stage 1, else the placement with the supernet's mixer."""
    for stage in reversed(TRAINING_STAGES):
        if stage in results:
            model = results[stage].model_config_
            kinds = {entry.partition(":")[0] for entry in results[stage].plan}
            return {
                "stage": stage,
                "plan": list(results[stage].plan),
                "mixers": {kind: sizes for kind, sizes in model["mixers"].items() if kind in kinds},
                "params": results["evaluate"].final_params if "evaluate" in results else None,
            }
    if "placement" in results:
        return {"stage": "placement", "plan": list(results["placement"].plan), "mixers": {}, "params": None}
    return None


def _comparison(result: EvaluateResult | None) -> dict[str, Any] | None:
    """Teacher and final side by side."""
    if result is None:
        return None
    contexts = sorted(set(result.teacher_cache_bytes) & set(result.final_cache_bytes), key=int)
    return {
        "accuracy": _side_by_side(result.teacher, result.final, "accuracy"),
        "loss": _side_by_side(result.teacher, result.final, "loss"),
        "params": _pair(result.teacher_params, result.final_params),
        "cache_bytes": {c: _pair(result.teacher_cache_bytes[c], result.final_cache_bytes[c]) for c in contexts},
        "scores": {"teacher": result.teacher.to_dict(), "final": result.final.to_dict()},
        "megatron": result.megatron.to_dict(),
        "measured": {
            name: _speeds(getattr(result.teacher_measured, name), getattr(result.final_measured, name))
            for name in ("generation_tokens_per_second", "prefill_tokens_per_second")
        }
        | {"batch_size": _batch_sizes(result.teacher_measured.extra, result.final_measured.extra)},
    }


def _side_by_side(teacher: Scores, final: Scores, field: str) -> dict[str, Any]:
    ours = getattr(final, field)
    return {task: _pair(value, ours[task]) for task, value in getattr(teacher, field).items() if task in ours}


def _pair(teacher: float, final: float) -> dict[str, float]:
    return {"teacher": teacher, "final": final}


def _speeds(teacher: dict[str, float] | None, final: dict[str, float] | None) -> dict[str, Any]:
    if not teacher or not final:
        return {}
    contexts = sorted(set(teacher) & set(final), key=int)
    return {c: {**_pair(teacher[c], final[c]), "ratio": final[c] / teacher[c]} for c in contexts}


def _batch_sizes(teacher: dict[str, Any], final: dict[str, Any]) -> dict[str, Any]:
    """Sequences at once, by context, where both models were timed."""
    ours, theirs = final.get("batch_size", {}), teacher.get("batch_size", {})
    return {c: _pair(theirs[c], ours[c]) for c in sorted(set(ours) & set(theirs), key=int)}


def _selection(config: RunConfig, stage: str, result: StageResult | None) -> dict[str, Any] | None:
    """A selection stage, candidates in the order of the ranking."""
    plain = _plain(result)
    if plain is None:
        return None
    place = {name: i for i, name in enumerate(plain["ranking"])}
    plain["candidates"].sort(key=lambda candidate: place.get(candidate["name"], len(place)))
    plain["throughput_mode"] = config.stage(stage).throughput.mode
    plain["context"] = str(max(config.stage(stage).throughput.contexts))
    return plain


def _training(result: StageResult | None) -> dict[str, Any] | None:
    plain = _plain(result)
    if plain is not None:
        plain.pop("model", None)
        plain.pop("model_config_", None)
    return plain


def _export(results: dict[str, StageResult]) -> dict[str, Any] | None:
    export = results.get("export")
    if export is None:
        return None
    return {
        "path": export.path,
        "model_type": export.model_type,
        "max_logit_difference": export.max_logit_difference,
    }


def _samples(config: RunConfig, stage: str) -> int:
    return config.stage(stage).eval.samples


def _steps(config: RunConfig) -> dict[str, int | None]:
    """Training steps behind the scores of each stage, without which no score says much."""
    compared = config.placement.compare_training
    stages = ("placement", *SELECTION_STAGES, *TRAINING_STAGES)
    return {stage: config.stage(stage).training.steps for stage in stages} | {
        "comparison": compared.steps if compared is not None else None
    }


def _provenance(run_dir: Path) -> dict[str, Any] | None:
    """The last launch, and how many there were."""
    launches = read_provenance(run_dir / "provenance.json")["launches"]
    return {**launches[-1], "launches": len(launches)} if launches else None
