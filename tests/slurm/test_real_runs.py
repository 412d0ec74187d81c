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
from slurm.runs import Run, Submitter, slurm_command

# One worker does both tests: the second starts from what the first has made.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200), pytest.mark.xdist_group("real")]
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


@pytest.fixture(scope="module")
def real(slurm, tmp_path_factory):
    """Submits runs of the miniature pipeline: real("name", "--stages", "stage1")."""
    folder = tmp_path_factory.mktemp("real")
    recipe = folder / "miniature.yaml"
    recipe.write_text(dump_yaml(miniature_config(folder)))
    submitter = Submitter(folder)

    def submit(name: str, *arguments: str, **options) -> Run:
        return submitter.submit(str(recipe), arguments, name, **options)

    yield submit
    submitter.close()


@pytest.fixture(scope="module")
def whole(real) -> Run:
    """The whole pipeline, waited for."""
    return real("whole", wait=True)


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


def test_whole_pipeline_from_submit_to_report(whole):
    assert whole.submitted.returncode == 0, whole.submitted.stdout + whole.submitted.stderr
    assert "whole: done" in whole.submitted.stdout
    views = whole.views()
    assert {view.state for view in views.values()} == {"done"}
    assert [name for name in views if "-" not in name] == list(STAGE_ORDER)
    for stage, candidates in CANDIDATES.items():
        jobs = [views[f"{stage}-{candidate}"] for candidate in candidates]
        assert set(views[stage].job.depends) == {view.job.name for view in jobs}
        starts, ends = zip(*(interval(view.job_id) for view in jobs))
        assert max(starts) < min(ends), f"candidates of {stage} ran one after the other"
        assert {row["name"] for row in whole.stage_result(stage)["candidates"]} == set(candidates)
    report = read_json(whole.path / "report.json")
    assert report["stages"], report
    assert (whole.path / "report.html").is_file() and (whole.path / "export" / "config.json").is_file()


def test_distillation_was_one_job_of_four_processes_on_two_nodes(whole):
    view = whole.views()["stage1"]
    logs = sorted((whole.path / "stages" / "stage1" / "logs").glob(f"stage1.{view.job_id}.0.*.log"))
    assert len(logs) == 2, "one log per node"
    ranks = [line for log in logs for line in log.read_text().splitlines() if line.startswith("rank ")]
    assert sorted(line.partition(" on ")[0] for line in ranks) == [f"rank {rank} of 4" for rank in range(4)]
    training = whole.stage_result("stage1")
    assert training["tokens"] == STEPS * 4 * 64, "one sequence per process and step"
    assert len([row for row in rows(whole) if row["split"] == "train"]) == STEPS


def test_interrupted_stage_is_queued_again_and_ends_with_the_same_metrics(whole, real):
    other = whole.path.parent / "interrupted"
    later = ("cluster", "code", "export", "report.*", "stage1", "stage2", "evaluate", "report", ".lock")
    shutil.copytree(whole.path, other, ignore=shutil.ignore_patterns(*later))
    run = real("interrupted", "--stages", "stage1")
    job = run.until_step("stage1", 12)
    slurm_command("scancel", "--signal=USR1", job.job_id)
    views = run.until_over()
    assert views["stage1"].state == "done"
    assert views["stage1"].restarts == 1
    assert run.events("stage1") == ["start", "end 75", "start", "end 0"]
    assert "going on after step" in run.launcher("logs", str(run.path), "stage1").stdout
    assert rows(run) == rows(whole)
    assert unmeasured(run.stage_result("stage1")) == unmeasured(whole.stage_result("stage1"))
