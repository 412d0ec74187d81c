"""Runs that train a layer plan given by the recipe, without a search."""

import pytest
import torch

import miniature
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import read_json
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.recipes.distill import known
from megatron_jet.configs.results import RESULT_TYPES
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.upstream import upstream_stages
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.evaluation.report.build import build_report
from megatron_jet.postnas.catalog import stage_named
from megatron_jet.postnas.pipeline import run_stage
from megatron_jet.postnas.stage import StageContext

PLAN = ("jet", "attn", "swa:8", "gla")  # two linear mixers, which no search yields


def open_context(run) -> StageContext:
    return StageContext(run, RunConfig.parse(load_yaml(run / "config.yaml")))


@pytest.fixture(scope="module")
def ctx(tmp_path_factory):
    """A finished run."""
    root = tmp_path_factory.mktemp("known")
    miniature.write_inputs(root)
    config = known(miniature.config(root), PLAN, recipe="known")
    changes = {name: getattr(config, name) for name in ("recipe", "stages", "student_plan")}
    ctx = open_context(miniature.open_run(root, "run", **changes))
    for stage in ctx.config.stages:
        run_stage(ctx, stage)
    return ctx


def test_the_plan_is_trained_as_it_is(ctx):
    assert not (ctx.run_dir / "stages" / "placement").exists()
    for stage in ("stage1", "stage2"):
        result = ctx.result(stage)
        assert result.plan == PLAN and set(result.model_config_["mixers"]) == {"jet", "gla"}
        assert result.tokens == ctx.config.stage(stage).training.tokens
    prepared, trained = (
        GlobalCheckpoint(path) for path in (ctx.teacher_checkpoint, ctx.path(ctx.result("stage1").checkpoint))
    )
    kept = [key for key in trained if ".mlp." in key or "embedding" in key]
    assert kept and all(torch.equal(prepared.read(key), trained.read(key)) for key in kept), "stage 1 starts from it"


def test_the_export_is_that_model_and_its_card_says_so(ctx):
    export = ctx.path(ctx.result("export").path)
    assert tuple(load_for_causal_lm(export).config.layer_types) == ("jet", "attn", "swa", "gla")
    card = (export / "README.md").read_text()
    assert "placement: given by the recipe" in card and "PostNAS" not in card
    evaluated = ctx.result("evaluate")
    assert evaluated.final.loss == pytest.approx(evaluated.megatron.loss, rel=1e-4)


def test_the_report_shows_what_there_is(ctx):
    build_report(ctx.run_dir)
    report = read_json(ctx.run_dir / "report.json")
    assert report["complete"] and report["placement"] is None and report["final"]["plan"] == list(PLAN)
    assert [row["stage"] for row in report["stages"]] == ["prepare", "stage1", "stage2", "export", "evaluate"]
    page = (ctx.run_dir / "report.html").read_text()
    assert "is distilled into the layer plan that the recipe gives" in page and "Stage 1" in page
    assert "found by search" not in page and "still being searched" not in page and 'id="placement"' not in page


@pytest.mark.parametrize("stage", [name for name in RESULT_TYPES if name not in ("prepare", "report")])
@pytest.mark.parametrize("searched", [True, False])
def test_the_launcher_knows_what_a_stage_reads(stage, searched, tmp_path, monkeypatch):
    """`upstream_stages` is checked before a launch; here it is compared with what the stages ask for."""
    config = miniature.config(tmp_path)
    if not searched:
        if stage not in ("stage1", "stage2", "export", "evaluate"):
            return
        config = known(config, PLAN, recipe="known")
    ctx = StageContext(tmp_path, config)
    asked = set()

    class Anything(dict):
        """Stands for any result: what matters is that it was asked for."""

        def __getattr__(self, name):
            return {"plan": PLAN, "winner_mixer": "jet", "winner_config": config.mixers["jet"].to_dict()}.get(name)

    teacher = miniature_model()

    def result(self, name):
        asked.add(name)
        return Anything()

    monkeypatch.setattr(StageContext, "result", result)
    monkeypatch.setattr(StageContext, "upstream", lambda self, name: asked.add(name) or {"plan": PLAN})
    monkeypatch.setattr(StageContext, "teacher", property(lambda self: teacher))
    stage_named(stage).inputs(ctx)
    needed = set(upstream_stages(config, stage))
    assert asked <= needed
    assert needed - asked <= {"placement"}, "placement may be read later, for the card"


def miniature_model():
    from megatron_jet.configs.model import ModelConfig

    return ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=512,
        layer_plan=("attn",) * 4,
    )


def test_a_known_plan_leaves_nothing_to_search(tmp_path):
    config = miniature.config(tmp_path)
    with pytest.raises(UserError, match=r"leaves nothing to search for; set stages=\[prepare,stage1,"):
        RunConfig.parse({**config.to_dict(), "student_plan": PLAN})
    with pytest.raises(UserError, match="'rwkv'"):
        known(config, ("rwkv", "attn", "attn", "attn"), recipe="known")
    with pytest.raises(UserError, match="stage1.init=teacher"):
        known(config.replace(stage1=config.stage1.replace(init="search")), PLAN, recipe="known")
