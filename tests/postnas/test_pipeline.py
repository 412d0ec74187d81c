"""How a stage is skipped, resumed, started over and recorded, with a stage that does nothing but count."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_jet.configs.checksums import DamagedError
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_json, read_json, write_json
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.results import Measured, Scores, StageResult
from megatron_jet.configs.signals import Interrupted
from megatron_jet.postnas import pipeline
from megatron_jet.postnas.stage import StageContext, persisted, strip_measured


@dataclass
class CountingStage:
    """Stands in for the report stage, whose result has no fields of its own."""

    given: dict
    name: str = "report"
    kept: tuple = ()
    runs: int = 0
    before_end: list = field(default_factory=list)

    def inputs(self, ctx):
        return self.given

    def run(self, ctx, inputs_hash):
        self.runs += 1
        persisted(ctx.stage_dir(self.name) / "piece.json", Scores, self._piece)
        for action in self.before_end:
            action(ctx)
        return StageResult(stage=self.name, inputs_hash=inputs_hash, tokens=7, measured=Measured(seconds=1.0))

    pieces: int = 0

    def _piece(self):
        self.pieces += 1
        return Scores(accuracy={}, loss={"x": 1.0})


@pytest.fixture
def ctx(tmp_path):
    return StageContext(tmp_path, tiny())


@pytest.fixture
def stage(monkeypatch):
    stage = CountingStage({"a": 1})
    monkeypatch.setattr(pipeline, "stage_named", lambda name: stage)
    return stage


def status(ctx) -> dict:
    return read_json(ctx.stage_dir("report") / "status.json")


def test_a_finished_stage_is_not_repeated(ctx, stage):
    first = pipeline.run_stage(ctx, "report")
    assert pipeline.run_stage(ctx, "report") == first
    assert stage.runs == 1
    assert status(ctx)["state"] == "done"
    record = read_json(ctx.stage_dir("report") / "inputs.json")
    assert record["inputs"] == {"a": 1} and record["hash"] == first.inputs_hash


def test_changed_inputs_start_it_over(ctx, stage):
    pipeline.run_stage(ctx, "report")
    leftover = ctx.stage_dir("report") / "jobs" / "old"
    leftover.mkdir(parents=True)
    stage.given = {"a": 2}
    again = pipeline.run_stage(ctx, "report")
    assert stage.runs == 2 and stage.pieces == 2
    assert not leftover.exists()
    assert read_json(ctx.stage_dir("report") / "result.json")["inputs_hash"] == again.inputs_hash


def test_an_interrupted_stage_goes_on_where_it_was(ctx, stage):
    stage.before_end = [lambda ctx: os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(Interrupted, match="SIGTERM"):
        pipeline.run_stage(ctx, "report")
    assert status(ctx)["state"] == "interrupted" and not (ctx.stage_dir("report") / "result.json").exists()
    stage.before_end = []
    pipeline.run_stage(ctx, "report")
    assert (stage.runs, stage.pieces) == (2, 1), "the finished piece is taken from its file"
    assert status(ctx)["state"] == "done"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "handlers are put back"


def test_a_failure_is_recorded_in_one_line(ctx, stage):
    def fail(ctx):
        raise ValueError("two\nlines")

    stage.before_end = [fail]
    with pytest.raises(ValueError):
        pipeline.run_stage(ctx, "report")
    assert status(ctx)["state"] == "failed" and status(ctx)["message"] == "ValueError: two lines"


def test_seconds_add_up_over_attempts(ctx, stage):
    directory = ctx.stage_dir("report")
    write_json(directory / "status.json", {"state": "interrupted", "measured": {"seconds": 100.0}})
    pipeline.run_stage(ctx, "report")
    assert status(ctx)["measured"]["seconds"] >= 100.0


def test_a_result_of_another_version_is_done_again(ctx, stage):
    pipeline.run_stage(ctx, "report")
    path = ctx.stage_dir("report") / "result.json"
    write_json(path, {**read_json(path), "unheard_of": 1})
    pipeline.run_stage(ctx, "report")
    assert stage.runs == 2


def test_progress_reaches_status_json(ctx, stage, monkeypatch):
    monkeypatch.setattr("megatron_jet.postnas.status.WRITE_EVERY", 0.0)
    seen = {}

    def train(ctx):
        ctx.status.phase("training gla")
        ctx.status.observe({"split": "train", "step": 3, "total_steps": 9, "loss": 1.5, "kl": 0.5, "tokens": 1})
        seen.update(status(ctx))

    stage.before_end = [train]
    pipeline.run_stage(ctx, "report")
    assert (seen["state"], seen["job"], seen["step"], seen["total_steps"]) == ("running", "training gla", 3, 9)
    assert seen["losses"] == {"loss": 1.5, "kl": 0.5} and seen["pid"] == os.getpid()


def test_unknown_stage_and_missing_upstream(tmp_path):
    ctx = StageContext(tmp_path, tiny())
    with pytest.raises(UserError, match="unknown stage 'stage3'"):
        pipeline.run_stage(ctx, "stage3")
    with pytest.raises(UserError, match="stage 'prepare' has not finished"):
        pipeline.run_stage(ctx, "placement")
    with pytest.raises(UserError, match="has no candidate 'mamba'; known: gla, gated_delta_net, jet"):
        pipeline.run_candidate(ctx, "block_selection", "mamba")


def test_paths_are_stored_relative_to_the_run(ctx):
    inside = ctx.run_dir / "stages" / "x"
    assert ctx.relative(inside) == "stages/x" and ctx.path("stages/x") == inside
    assert ctx.relative(Path("/elsewhere")) == "/elsewhere" and ctx.path("/elsewhere") == Path("/elsewhere")


def test_strip_measured_reaches_every_depth():
    value = {"a": 1, "measured": 2, "b": [{"measured": 1, "c": 3}], "teacher_measured": 4}
    assert strip_measured(value) == {"a": 1, "b": [{"c": 3}]}


def test_stage_whose_inputs_are_missing_says_so_in_its_status(ctx):
    with pytest.raises(UserError, match="has not finished"):
        pipeline.run_stage(ctx, "stage2")
    row = read_json(ctx.stage_dir("stage2") / "status.json")
    assert row["state"] == "failed" and "run it first (--stages " in row["message"]
    assert not (ctx.stage_dir("stage2") / "result.json").exists()


def change_a_digit(path: Path) -> None:
    text = path.read_text()
    assert "1.0" in text
    path.write_text(text.replace("1.0", "2.0"))


def test_a_changed_result_is_noticed_and_made_again(ctx, stage, caplog):
    first = pipeline.run_stage(ctx, "report")
    change_a_digit(ctx.stage_dir("report") / "result.json")
    with pytest.raises(UserError, match=r"result\.json: is not what was written .*--stages report"):
        ctx.result("report")
    assert pipeline.run_stage(ctx, "report") == first
    assert stage.runs == 2 and "result.json: is not what was written" in caplog.text
    assert ctx.result("report") == first


def test_a_changed_piece_of_work_is_noticed_and_done_again(ctx, stage, caplog):
    stage.before_end = [lambda ctx: os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(Interrupted):
        pipeline.run_stage(ctx, "report")
    change_a_digit(ctx.stage_dir("report") / "piece.json")
    stage.before_end = []
    pipeline.run_stage(ctx, "report")
    assert stage.pieces == 2 and "piece.json: is not what was written" in caplog.text
    assert read_json(ctx.stage_dir("report") / "piece.json")["loss"] == {"x": 1.0}


def test_records_without_a_hash_are_from_before_and_count(ctx, stage):
    pipeline.run_stage(ctx, "report")
    for path in ctx.stage_dir("report").glob("*.sha256"):
        path.unlink()
    pipeline.run_stage(ctx, "report")
    assert stage.runs == 1


def test_a_stage_that_starts_over_says_what_changed(ctx, stage, caplog):
    stage.given = {"teacher": "a", "settings": {"steps": 1, "lr": 2.0}, "gone": 0}
    pipeline.run_stage(ctx, "report")
    stage.given = {"teacher": "b", "settings": {"steps": 1, "lr": 3.0}}
    pipeline.run_stage(ctx, "report")
    assert "stage 'report' starts over: its inputs have changed (teacher, settings.lr, gone)" in caplog.text
    assert "settings.lr" in read_json(ctx.stage_dir("report") / "inputs.json")["started_over"]


ODD = {
    "list": b"[]",
    "object": b"{}",
    "null": b"null",
    "text": b'"x"',
    "null inside": b'{"hash": null, "measured": null, "inputs": null}',
    "list inside": b'{"hash": [], "measured": [1], "inputs": 3}',
    "cut": b'{"hash": "ab',
    "binary": b"\xff\x00\xfe",
    "empty": b"",
    "folder": None,
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["inputs.json", "status.json", "result.json", "piece.json", "result.json.sha256"])
def test_odd_records_do_not_stop_a_stage(ctx, stage, name, odd):
    stage.before_end = [lambda ctx: os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(Interrupted):
        pipeline.run_stage(ctx, "report")
    stage.before_end = []
    path = ctx.stage_dir("report") / name
    path.unlink(missing_ok=True)
    if ODD[odd] is None:
        path.mkdir()
    else:
        path.write_bytes(ODD[odd])
    expected = hash_json({"a": 1})
    assert pipeline.run_stage(ctx, "report").inputs_hash == expected
    assert read_json(ctx.stage_dir("report") / "inputs.json")["hash"] == expected
    assert status(ctx)["state"] == "done" and ctx.result("report").tokens == 7


@pytest.mark.parametrize(
    "where", ["prepared/teacher", "stages/stage1/jobs/x/checkpoints/step-1/model", "export", "elsewhere"]
)
def test_a_damaged_checkpoint_of_another_stage_comes_with_a_way_out(ctx, stage, where):
    damaged = ctx.run_dir / where if where != "elsewhere" else Path("/elsewhere")

    def fail(ctx):
        raise DamagedError(f"{damaged}: x is not what was written", damaged)

    stage.before_end = [fail]
    way_out = {"prepared/teacher": "prepare/result.json and run again", "elsewhere": "give an undamaged copy"}
    way_out["export"] = "delete .*stages/export/result.json and run again"
    with pytest.raises(UserError, match=way_out.get(where, "delete .*stage1/result.json and run again")):
        pipeline.run_stage(ctx, "report")
    assert "run again" in status(ctx)["message"] or where == "elsewhere"
