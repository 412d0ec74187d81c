"""Real training as Slurm jobs: all of PostNAS from submit to report, and a stage that is interrupted and goes on."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from megatron_jet.configs.files import read_json
from megatron_jet.configs.overrides import dump_yaml
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import STAGE_ORDER, StageResources
from slurm.runs import Run, slurm_command

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
STEPS = 40
# Starting a process costs more than what it trains here, so only one stage has two candidates.
CANDIDATES = {"block_selection": ("gla", "gated_delta_net"), "new_block": ("jet",), "hardware_search": ("8x16x2",)}


def miniature_config(root: Path) -> RunConfig:
    """The miniature pipeline, with a stage 1 on two nodes that lasts long enough to be interrupted."""
    from megatron_jet.training import cpu_backend

    cpu_backend.install()  # before anything imports Megatron
    import miniature

    miniature.write_inputs(root)
    base = miniature.config(root, nproc=2)
    # Four processes share a batch of four.
    training = base.stage1.training.replace(
        steps=STEPS, micro_batch_size=1, checkpoint_interval=10, validation_interval=20
    )
    return base.replace(
        block_selection=base.block_selection.replace(candidates=CANDIDATES["block_selection"]),
        new_block=base.new_block.replace(candidates=CANDIDATES["new_block"]),
        hardware_search=base.hardware_search.replace(grid=base.hardware_search.grid[:1]),
        stage1=base.stage1.replace(training=training, resources=StageResources(nodes=2)),
    )


def rows(run: Run) -> list[dict]:
    """metrics.jsonl of stage 1 without what depends on clock and machine."""
    path = run.path / "stages" / "stage1" / "jobs" / "student" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "memory_mib")} for row in found]


def unmeasured(result: dict) -> dict:
    return {key: value for key, value in result.items() if key != "measured"}


def interval(job_id: str) -> tuple[datetime, datetime]:
    """Start and end of a job."""
    [line] = slurm_command("sacct", "-nXP", "-j", job_id, "-o", "Start,End").split()
    start, end = line.split("|")
    return datetime.fromisoformat(start), datetime.fromisoformat(end)


def test_pipeline_from_submit_to_report_and_an_interrupted_stage(submitter):
    """One test, because the interrupted stage starts from what the whole pipeline has made."""
    recipe = submitter.folder / "miniature.yaml"
    recipe.write_text(dump_yaml(miniature_config(submitter.folder)))
    whole = submitter.submit(str(recipe), name="whole", wait=True)
    check_pipeline(whole)
    check_distillation(whole)
    later = ("cluster", "code", "export", "report.*", "stage1", "stage2", "evaluate", "report", ".lock")
    shutil.copytree(whole.path, submitter.folder / "other", ignore=shutil.ignore_patterns(*later))
    check_interruption(submitter.submit(str(recipe), ("--stages", "stage1"), name="other"), whole)


def check_pipeline(run: Run) -> None:
    """Every job is done, candidates ran side by side and were ranked, and the report is there."""
    assert run.submitted.returncode == 0, run.submitted.stdout + run.submitted.stderr
    assert "whole: done" in run.submitted.stdout
    views = run.views()
    assert {view.state for view in views.values()} == {"done"}
    assert [name for name in views if "-" not in name] == list(STAGE_ORDER)
    for stage, candidates in CANDIDATES.items():
        jobs = [views[f"{stage}-{candidate}"] for candidate in candidates]
        assert set(views[stage].job.depends) == {view.job.name for view in jobs}
        starts, ends = zip(*(interval(view.job_id) for view in jobs))
        assert max(starts) < min(ends), f"candidates of {stage} ran one after the other"
        assert {row["name"] for row in run.stage_result(stage)["candidates"]} == set(candidates)
    stages = {row["stage"]: row["state"] for row in read_json(run.path / "report.json")["stages"]}
    assert stages == dict.fromkeys(STAGE_ORDER[:-1], "done")
    assert (run.path / "report.html").is_file() and (run.path / "export" / "config.json").is_file()


def check_distillation(run: Run) -> None:
    """Stage 1 was one job of four processes on two nodes, and each saw its share of every batch."""
    job = run.views()["stage1"].job_id
    logs = sorted((run.path / "stages" / "stage1" / "logs").glob(f"stage1.{job}.0.*.log"))
    assert len(logs) == 2, "one log per node"
    lines = [line for log in logs for line in log.read_text().splitlines()]
    ranks = [line for line in lines if line.startswith("rank ")]
    assert sorted(line.partition(" on ")[0] for line in ranks) == [f"rank {rank} of 4" for rank in range(4)]
    assert not [line for line in lines if "differs from rank 0" in line], "ranks saved different things as common"
    assert run.stage_result("stage1")["tokens"] == STEPS * 4 * 64, "a sequence per process and step"


def check_interruption(run: Run, whole: Run) -> None:
    """USR1 in the middle of stage 1: saved, queued again, and the end is that of the run that was left alone."""
    job = run.until_step("stage1", 8)
    slurm_command("scancel", "--signal=USR1", job.job_id)
    view = run.until_over()["stage1"]
    assert (view.state, view.restarts) == ("done", 1)
    assert run.events("stage1") == ["start", "end 75", "start", "end 0"]
    assert "going on after step" in run.launcher("logs", str(run.path), "stage1").stdout
    assert len([row for row in rows(run) if row["split"] == "train"]) == STEPS
    assert rows(run) == rows(whole)
    assert unmeasured(run.stage_result("stage1")) == unmeasured(whole.stage_result("stage1"))
