"""One small run through every stage, and what must hold in its directory."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import miniature
from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.files import read_json
from megatron_jet.configs.layer_plan import full_layers
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.results import RESULT_TYPES
from megatron_jet.configs.run import RunConfig
from megatron_jet.convert.global_checkpoint import GlobalCheckpoint
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.evaluation.hf_scores import as_scores, score_hf
from megatron_jet.model.paths import set_paths
from megatron_jet.postnas import jobs, placement, prepare, scoring, selection, training_stages
from megatron_jet.postnas.pipeline import run_candidate, run_stage
from megatron_jet.postnas.scoring import PlanScorer, eval_sets, plan_scorer
from megatron_jet.postnas.stage import StageContext, strip_measured
from megatron_jet.tasks.evalset import Scorer

STAGES = [name for name in RESULT_TYPES if name != "report"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("miniature")
    miniature.write_inputs(path)
    return path


@pytest.fixture(scope="module")
def ctx(root):
    """The finished run."""
    ctx = open_context(miniature.open_run(root, "run"))
    for stage in STAGES:
        run_stage(ctx, stage)
    return ctx


def open_context(run) -> StageContext:
    return StageContext(run, RunConfig.parse(load_yaml(run / "config.yaml")))


def tensors(path) -> dict[str, torch.Tensor]:
    source = GlobalCheckpoint(path)
    return {key: source.read(key) for key in source}


def changed(before: dict, after: dict) -> set[str]:
    assert set(before) == set(after)
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_every_stage_is_done_and_none_is_repeated(ctx, monkeypatch):
    for stage in STAGES:
        assert read_json(ctx.stage_dir(stage) / "status.json")["state"] == "done"

    def refuse(*args, **kwargs):
        raise AssertionError("a finished stage worked again")

    for module, name in ((jobs, "train"), (scoring, "build_model"), (prepare, "import_hf")):
        monkeypatch.setattr(module, name, refuse)
    for stage in STAGES:
        assert run_stage(ctx, stage) == ctx.result(stage)


def test_the_supernet_all_full_is_the_teacher(ctx):
    """The teacher as a Hugging Face model and the supernet with every layer full score the same."""
    settings = ctx.config.placement
    teacher = load_for_causal_lm(ctx.config.teacher.path, dtype=torch.float32)
    scores = score_hf(teacher, eval_sets(ctx, "search", settings.eval), settings.eval.batch_size)
    found = ctx.result("placement").all_full
    assert found.accuracy == scores.accuracy
    assert found.loss == pytest.approx(scores.loss, abs=1e-4)


def test_supernet_training_touched_linear_paths_only(ctx):
    supernet = ctx.stage_dir("placement") / "jobs" / "supernet" / "checkpoints"
    trained = tensors(next(supernet.glob("step-*/model")))
    teacher = tensors(ctx.teacher_checkpoint)
    for key, tensor in trained.items():
        if ".paths.gla." not in key:
            assert torch.equal(tensor, teacher[key.replace("paths.attn.", "")]), key
    assert sum(".paths.gla." in key for key in trained) > 4 * ctx.teacher.num_layers


def test_placement_keeps_all_its_evidence(ctx):
    result = ctx.result("placement")
    layers = ctx.teacher.num_layers
    assert [row.full for row in result.heat_map] == [(layer,) for layer in range(layers)]
    for row in (*result.heat_map, *result.beam[-1].candidates):
        assert set(row.scores.loss) == {"recall", "choice", "text"} and set(row.scores.accuracy) == {"recall", "choice"}
    best = max(result.beam[-1].candidates, key=lambda c: (c.scores.accuracy["recall"], -c.scores.loss["recall"]))
    assert result.full == best.full == full_layers(result.plan)
    best = min(result.swa_beam[-1].candidates, key=lambda c: c.scores.loss["choice"])
    assert result.swa == best.full and result.plan[result.swa[0]] == "swa:8"
    names = [row.name for row in result.comparison]
    assert names[:2] == ["learned", "uniform"] and {"all_linear", "all_full"} < set(names)
    phases = {row.full for row in result.comparison if row.name.startswith("uniform")}
    assert phases == {(0,), (1,), (2,), (3,)}, "a budget of one has four even spacings"
    trained = {row.full: row.after for row in result.comparison if row.after is not None}
    assert set(trained) == {*phases, ()}, "the placement found is one of them"
    assert all(row.after == trained.get(row.full) for row in result.comparison)
    assert len({scores.loss["text"] for scores in trained.values()}) == len(trained), "each by weights of its own"
    assert result.tokens == sum(
        read_json(path)["tokens"] for path in ctx.stage_dir("placement").glob("jobs/*/train_result.json")
    )
    assert result.layer_forwards < result.layer_forwards_naive
    learned, uniform = (ctx.stage_dir("placement") / "jobs" / f"compare_{n}" for n in ("learned", "uniform"))
    if learned.exists() and uniform.exists():
        results = [read_json(path / "train_result.json") for path in (learned, uniform)]
        assert results[0]["tokens"] == results[1]["tokens"]


def test_scores_over_shared_prefixes_equal_whole_forwards(ctx):
    """Real supernet: every plan through Megatron's own forward, against the walk over the trie."""
    stage, settings = placement.PlacementStage(), ctx.config.placement
    linear = settings.linear
    plans = [(linear,) * 4, ("attn",) * 4, (linear, "attn", linear, "swa:8"), (linear, "attn", "swa:8", linear)]
    choices = (("attn", linear, "swa:8"),) * 4
    checkpoint = next((ctx.stage_dir("placement") / "jobs/supernet/checkpoints").glob("step-*/model"))
    with plan_scorer(ctx, stage._model(ctx), checkpoint, "search", settings.eval, choices) as scorer:
        shared = scorer.score(plans)
        for plan, scores in zip(plans, shared.scores):
            set_paths([scorer.model], plan)
            assert whole_forward(scorer).loss == pytest.approx(scores.loss, abs=1e-6)
    assert shared.layer_forwards == 4 + 4 + 3 + 2 and shared.layer_forwards_naive == 16


@torch.no_grad()
def whole_forward(scorer: PlanScorer):
    results = {}
    for evalset in scorer.sets:
        whole = Scorer(evalset)
        positions = torch.arange(evalset.tokens.shape[1]).expand_as(evalset.tokens)
        whole.update(slice(0, len(evalset.tokens)), scorer.model(evalset.tokens, positions, None).float())
        results[evalset.name] = whole.result()
    return as_scores(results)


def test_candidates_get_equal_training_and_costs_are_counted(ctx):
    result = ctx.result("block_selection")
    assert [c.name for c in result.candidates] == ["gla", "gated_delta_net", "jet"]
    assert len({c.tokens for c in result.candidates}) == 1 and result.tokens == 3 * result.candidates[0].tokens
    for candidate in result.candidates:
        model = selection.candidate_model(ctx, type(ctx.config.mixers[candidate.mixer]).parse(candidate.mixer_config))
        assert candidate.params == model_cost(model, 64).total_params
        assert model.layer_plan == tuple(
            candidate.mixer if entry == "gla" else entry for entry in ctx.result("placement").plan
        )
    assert sorted(result.ranking) == sorted(c.name for c in result.candidates) and result.winner == result.ranking[0]
    assert "highest mean accuracy" in result.rule
    assert not list(ctx.stage_dir("block_selection").glob("jobs/*/checkpoints")), "weights go once scored"


def test_equal_candidates_are_trained_once(ctx):
    blocks = {c.name: c for c in ctx.result("block_selection").candidates}
    new = {c.name: c for c in ctx.result("new_block").candidates}
    for name in ("gated_delta_net", "jet"):
        assert new[name].reused_from == "block_selection"
        assert new[name].scores == blocks[name].scores and new[name].recipe_hash == blocks[name].recipe_hash
    static = new["jet_static"]
    assert static.reused_from is None and static.ablation and static.mixer_config["static_kernel"]
    assert ctx.result("new_block").tokens == static.tokens
    assert ctx.result("new_block").winner != "jet_static"


def test_grid_has_constant_state_and_the_rule_is_stated(ctx):
    result = ctx.result("hardware_search")
    assert [c.name for c in result.candidates] == ["8x16x2", "16x8x2"]
    assert len({c.state_bytes for c in result.candidates}) == 1
    assert {c.mixer for c in result.candidates} == {ctx.result("new_block").winner_mixer}
    for candidate in result.candidates:
        assert candidate.measured.generation_tokens_per_second["64"] > 0, "timed as well"
    assert "within 3% of the best analytic" in result.rule and set(result.pareto) <= {"8x16x2", "16x8x2"}


def test_a_candidate_as_a_job_of_its_own_gives_the_same(ctx, root):
    """Its result is what the stage would have found; the stage then only ranks."""
    other = root / "candidates"
    shutil.copytree(ctx.run_dir, other)
    shutil.rmtree(other / "stages" / "block_selection")
    apart = open_context(other)
    for name in ("jet", "gla", "gated_delta_net"):
        run_candidate(apart, "block_selection", name)
        assert read_json(apart.stage_dir("block_selection") / "jobs" / name / "status.json")["state"] == "done"
    assert not (apart.stage_dir("block_selection") / "status.json").exists()
    before = {path: path.stat().st_mtime_ns for path in other.glob("stages/block_selection/jobs/*/train_result.json")}
    assert len(before) == 3
    result = run_stage(apart, "block_selection")
    assert strip_measured(result.to_dict()) == ctx.upstream("block_selection")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_stage1_trains_mixers_and_stage2_everything(ctx):
    first, second = ctx.result("stage1"), ctx.result("stage2")
    teacher = tensors(ctx.teacher_checkpoint)
    one, two = tensors(ctx.path(first.checkpoint)), tensors(ctx.path(second.checkpoint))
    frozen = [key for key in one if ".self_attention." not in key]
    assert all(torch.equal(one[key], teacher[key]) for key in frozen)
    assert set(changed(one, two)) == set(one), "stage 2 trains every tensor"
    plan = ctx.result("placement").plan
    softmax = [f"layers.{i}.self_attention.linear_qkv.weight" for i, entry in enumerate(plan) if entry != "gla"]
    assert all(not torch.equal(one[f"decoder.{key}"], teacher[f"decoder.{key}"]) for key in softmax)
    assert first.plan == second.plan == selection.candidate_model(ctx, selection.selected_mixer(ctx)).layer_plan
    assert [row["step"] for row in first.validation] == [2, 4]
    assert second.before == first.after, "stage 2 starts where stage 1 ended"
    assert second.after != second.before


def test_export_loads_by_itself_and_equals_the_megatron_model(ctx):
    result = ctx.result("export")
    assert result.max_logit_difference < 2e-4
    out = ctx.run_dir / "export"
    assert set(result.files) == {path.name for path in out.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules"), "the shipped code must be what runs"
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    batch = tokenizer("def f(x):", return_tensors="pt")
    assert model.generate(batch.input_ids, max_new_tokens=4, do_sample=False).shape[1] == batch.input_ids.shape[1] + 4
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card and "licence" in card and "run tiny" in card
    assert "by beam search (width 2) in a once-for-all supernet" in card and "at most 6 sequences" in card
    evaluated = ctx.result("evaluate")
    assert evaluated.final.loss == pytest.approx(evaluated.megatron.loss, abs=1e-5)
    assert evaluated.final.accuracy == evaluated.megatron.accuracy
    assert evaluated.megatron == ctx.result("stage2").after
    final = ModelConfig.parse(ctx.result("stage2").model_config_)
    assert evaluated.final_params == sum(p.numel() for p in model.parameters()) == model_cost(final, 1).total_params
    assert evaluated.final_cache_bytes["4096"] == model_cost(final, 4096).cache_bytes


def test_the_harness_gives_the_scores_of_the_evaluate_stage(ctx, tmp_path):
    """tools/evaluate.py on the export, with lm-evaluation-harness, against what the run's report shows."""
    path = Path(__file__).parents[2] / "tools" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate_tool", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    export, data, out = ctx.run_dir / "export", ctx.config.data.path, tmp_path / "scores.json"
    arguments = [str(export), "--tasks", "tiny", "--data", data, "--sequences", str(ctx.config.evaluate.eval.samples)]
    assert tool.main([*arguments, "--dtype", "fp32", "--device", "cpu", "--output", str(out)]) == 0
    found = read_json(out)["tasks"]
    expected = ctx.result("evaluate").final
    assert set(found) >= {f"tiny_{name}" for name in expected.loss}
    for name, loss in expected.loss.items():
        assert found[f"tiny_{name}"]["metrics"]["loss,none"] == pytest.approx(loss, rel=1e-5, abs=4e-6), name
    for name, accuracy in expected.accuracy.items():
        assert found[f"tiny_{name}"]["metrics"]["accuracy,none"] == accuracy, name


def test_changed_settings_redo_a_stage_and_what_follows(ctx, root):
    """Another stage 2 leaves stage 1 alone; the export no longer belongs to it."""
    other = root / "changed"
    shutil.copytree(ctx.run_dir, other)
    settings = ctx.config.stage2.replace(training=miniature.training(1, trainable=("*",)))
    again = StageContext(other, ctx.config.replace(stage2=settings))
    before = again.result("stage1")
    run_stage(again, "stage1")
    assert again.result("stage1") == before
    result = run_stage(again, "stage2")
    assert result.inputs_hash != ctx.result("stage2").inputs_hash and result.tokens < ctx.result("stage2").tokens
    assert run_stage(again, "export").inputs_hash != ctx.result("export").inputs_hash


def test_stage1_can_continue_the_search(ctx, root):
    """init=search starts from the winner's weights, which are then kept."""
    other = root / "continued"
    shutil.copytree(ctx.run_dir, other, ignore=shutil.ignore_patterns("hardware_search", "stage1", "stage2", "export"))
    again = StageContext(other, ctx.config.replace(stage1=ctx.config.stage1.replace(init="search")))
    hardware = run_stage(again, "hardware_search")
    winner = selection.winner_checkpoint(again)
    assert hardware.winner in str(winner)
    start = training_stages.STAGE1._start(again)
    assert start.checkpoint == winner
    result = run_stage(again, "stage1")
    assert result.before != ctx.result("stage1").before


def test_a_stage_can_have_a_blend_of_its_own(ctx, root):
    """Stage 2 adds data (paper, 3.4)."""
    config = ctx.config
    other = config.replace(stage2=config.stage2.replace(blend={"recall": 1.0}))
    changed = StageContext(ctx.run_dir, other)
    assert changed.training_data("stage2").blend == {"recall": 1.0}
    assert changed.training_data("stage1") == changed.data == ctx.data
