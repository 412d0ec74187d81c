"""Published parameter counts and cache sizes, and the tool that prints them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.estimate import is_trainable, trainable_params, training_flops_per_token, training_memory
from megatron_jet.configs.estimate_text import format_bytes, format_count, format_seconds, table
from megatron_jet.configs.hf_format import model_to_hf
from megatron_jet.configs.layer_plan import linear_kinds
from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.recipes.jet_nemotron import jet_nemotron_2b, jet_nemotron_4b
from megatron_jet.configs.recipes.known_models import (
    KNOWN_MODELS,
    jet_nemotron_2b_model,
    jet_nemotron_4b_model,
    qwen2_5_1_5b,
    qwen2_5_3b,
    qwen3_1_7b,
)
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.run_estimate import estimate_run, planned_student
from megatron_jet.configs.training import LOGIT_CHUNK_TENSORS, LOGIT_CHUNK_TOKENS, LossConfig, ParallelConfig

SCRIPT = Path(__file__).parents[2] / "tools" / "estimate.py"
MIB = 1 << 20
# Jet-Nemotron paper, hardware-aware search: d_k, d_v, heads -> billions of parameters.
GRID = {
    (256, 288, 4): 1.62,
    (192, 384, 4): 1.64,
    (128, 576, 4): 1.70,
    (192, 192, 8): 1.70,
    (128, 288, 8): 1.74,
    (128, 192, 12): 1.78,
    (96, 256, 12): 1.84,
    (64, 384, 12): 1.98,
}


@pytest.mark.parametrize(
    ("model", "billions"), [(jet_nemotron_2b_model(), 1.965), (jet_nemotron_4b_model(), 3.960), (qwen2_5_1_5b(), 1.544)]
)
def test_parameters(model, billions):
    assert round(model_cost(model, 1).total_params / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("model", "mib"),
    [
        (qwen2_5_1_5b(), 1792.0),
        (qwen3_1_7b(), 7168.0),
        (jet_nemotron_2b_model(), 157.25),
        (jet_nemotron_4b_model(), 258.0),
    ],
)
def test_cache_at_64k(model, mib):
    assert model_cost(model, 65536).cache_bytes == mib * MIB


@pytest.mark.parametrize(("sizes", "billions"), GRID.items())
def test_grid_of_the_hardware_search(sizes, billions):
    d_k, d_v, heads = sizes
    mixer = GatedDeltaNetConfig(num_heads=heads, head_dim=d_k, expand_v=d_v / d_k)
    plan = tuple("attn" if i in (14, 19, 20, 21) else "gated_delta_net" for i in range(28))
    model = qwen2_5_1_5b().with_plan(plan, {"gated_delta_net": mixer})
    assert model_cost(model, 1).total_params / 1e9 == pytest.approx(billions, abs=0.01)


def test_parts_add_up_to_the_whole():
    for build in KNOWN_MODELS.values():
        cost = model_cost(build(), 4096)
        assert cost.total_params == cost.embedding_params + cost.mlp_params + cost.norm_params + cost.mixer_params
        assert cost.cache_bytes == sum(part.cache_bytes for part in cost.by_kind.values())
        assert sum(part.layers for part in cost.by_kind.values()) == build().num_layers


def test_cache_grows_with_the_context_in_full_layers_only():
    short, long = (model_cost(jet_nemotron_2b_model(), n).by_kind for n in (4096, 65536))
    assert long["attn"].cache_bytes == 16 * short["attn"].cache_bytes
    assert long["jet"].cache_bytes == short["jet"].cache_bytes
    assert long["swa"].cache_bytes == short["swa"].cache_bytes
    below_window = model_cost(jet_nemotron_2b_model(), 100).by_kind["swa"].cache_bytes
    assert below_window == 2 * 100 * 2 * 2 * 128 * 2  # two layers, keys and values, two heads of 128 in two bytes


def test_planned_student_of_the_paper_recipes_has_the_published_size():
    for recipe, teacher, published in (
        (jet_nemotron_2b(), qwen2_5_1_5b(), jet_nemotron_2b_model()),
        (jet_nemotron_4b(), qwen2_5_3b(), jet_nemotron_4b_model()),
    ):
        student = planned_student(recipe, teacher)
        assert model_cost(student, 65536).total_params == model_cost(published, 65536).total_params
        assert model_cost(student, 65536).cache_bytes == model_cost(published, 65536).cache_bytes


def test_the_planned_student_has_the_size_that_the_search_is_expected_to_find():
    """Of whatever mixer it resizes; without that search, or an expectation, the mixer's own."""
    config, teacher = jet_nemotron_2b(), qwen2_5_1_5b()

    def planned(config):
        student = planned_student(config, teacher)
        (kind,) = linear_kinds(student.layer_plan)
        mixer = student.mixers[kind]
        return kind, (mixer.head_dim, mixer.head_v_dim, mixer.num_heads)

    assert planned(config) == ("jet", (96, 256, 12))
    search = config.hardware_search
    table_2 = config.replace(hardware_search=search.replace(mixer="gated_delta_net"))
    assert planned(table_2) == ("gated_delta_net", (96, 256, 12))
    own = ("jet", (192, 384, 4))
    assert planned(config.replace(hardware_search=search.replace(expected=None))) == own
    stages = tuple(stage for stage in config.stages if stage != "hardware_search")
    assert planned(config.replace(stages=stages)) == own
    # The supernet is trained before anything is sized.
    assert planned_student(config, teacher, "gla").mixers["gla"] == config.mixers["gla"]
    with pytest.raises(
        UserError, match=r"hardware_search.expected: '96x256x13' is not in the grid; it has 256x288x4, "
    ):
        search.replace(expected="96x256x13")


def test_every_placement_that_is_trained_for_comparison_is_counted():
    config, teacher = tiny(), qwen2_5_1_5b()
    placement = config.placement.replace(budget=7)

    def names(**changes):
        changed = config.replace(placement=placement.replace(**changes))
        return [run.name for run in estimate_run(changed, teacher).stages[1].runs]

    every = [f"compare_uniform_phase_{phase}" for phase in (0, 1, 3)]
    assert names() == ["supernet", "compare_learned", "compare_uniform", *every, "compare_all_linear"]
    assert names(comparison="declared") == ["supernet", "compare_learned", "compare_uniform"]
    assert names(compare_training=None) == ["supernet"]


@pytest.mark.parametrize(("budget", "swa_budget"), [(5, 30), (5, 23), (28, 0)])
def test_budgets_that_leave_no_linear_layer_are_refused(budget, swa_budget):
    config = tiny().replace(placement=tiny().placement.replace(budget=budget, swa_budget=swa_budget))
    with pytest.raises(UserError, match="do not fit 28 layers: at least one must stay linear"):
        planned_student(config, qwen2_5_1_5b())


def test_one_linear_layer_is_enough():
    config = tiny().replace(placement=tiny().placement.replace(budget=5, swa_budget=22))
    plan = planned_student(config, qwen2_5_1_5b()).layer_plan
    assert sum(not entry.startswith(("attn", "swa")) for entry in plan) == 1


def test_trainable_patterns():
    assert is_trainable("a.b.weight", ("*",))
    assert not is_trainable("a.b.weight", ("*", "!*.weight"))
    assert is_trainable("a.b.weight", ("!*.weight", "*.b.*"))
    assert not is_trainable("a.b.weight", ("*.c.*",))


def test_trainable_groups_of_the_recipes():
    student = planned_student(tiny(), qwen2_5_1_5b())
    cost = model_cost(student, 1)
    linear = cost.by_kind["jet"].mixer_params
    assert trainable_params(student, tiny().placement.training.trainable) == linear
    assert trainable_params(student, tiny().stage1.training.trainable) == cost.mixer_params
    assert trainable_params(student, tiny().stage2.training.trainable) == cost.total_params


def test_full_training_needs_three_forwards_and_the_teachers():
    student, teacher, training = planned_student(tiny(), qwen2_5_1_5b()), qwen2_5_1_5b(), tiny().stage2.training
    plain = training.replace(loss=LossConfig(cross_entropy=1.0))
    forward = model_cost(student, training.seq_length).flops_per_token
    assert training_flops_per_token(student, teacher, plain) == pytest.approx(3 * forward)
    taught = forward * 3 + model_cost(teacher, training.seq_length).flops_per_token
    assert training_flops_per_token(student, teacher, training) == pytest.approx(taught)
    frozen = tiny().stage1.training.replace(loss=LossConfig(cross_entropy=1.0))
    assert 2 * forward < training_flops_per_token(student, None, frozen) < 3 * forward


def test_memory_by_part():
    student, teacher, training = jet_nemotron_2b_model(), qwen2_5_1_5b(), jet_nemotron_2b().stage2.training
    params = model_cost(student, 1).total_params
    one = training_memory(student, teacher, training, ParallelConfig(), "bf16", 1)
    assert (one.weights, one.gradients, one.optimizer, one.teacher) == (2 * params, 4 * params, 12 * params, 0)
    again = training.replace(recompute=True)
    spread = training_memory(student, teacher, again, ParallelConfig(), "bf16", 32)
    assert spread.optimizer == pytest.approx(one.optimizer / 32, abs=1)
    sharded = training_memory(student, teacher, training, ParallelConfig(tensor=2, pipeline=2), "bf16", 32)
    assert sharded.weights == pytest.approx(one.weights / 4, abs=1)
    kept = training_memory(student, teacher, training, ParallelConfig(), "bf16", 32)
    assert kept.activations > 4 * spread.activations
    distilled = training_memory(student, teacher, jet_nemotron_2b().stage1.training, ParallelConfig(), "bf16", 32)
    assert distilled.teacher == 2 * model_cost(teacher, 1).total_params
    assert distilled.gradients < one.gradients


def from_teacher(config):
    """With a stage 1 that needs no weights of the search."""
    return config.replace(stage1=config.stage1.replace(init="teacher"))


@pytest.mark.parametrize("recipe", [jet_nemotron_2b, jet_nemotron_4b])
def test_paper_recipes_recompute_only_where_activations_do_not_fit(recipe):
    """Recomputation costs a quarter of the speed. An H100 has 80 GiB; a tenth is for libraries and fragments."""
    config, room = recipe(), 72 * 2**30
    teacher = qwen2_5_1_5b() if recipe is jet_nemotron_2b else qwen2_5_3b()
    needed = {stage.stage: stage.memory.total for stage in estimate_run(config, teacher).stages if stage.memory}
    assert len(needed) == 6 and max(needed.values()) <= room
    plain = {
        name: config.stage(name).replace(training=config.stage(name).training.replace(recompute=False))
        for name in needed
    }
    kept = {
        stage.stage: stage.memory.total
        for stage in estimate_run(config.replace(**plain), teacher).stages
        if stage.memory
    }
    recomputed = {name for name in needed if config.stage(name).training.recompute}
    alike = {name for name in needed if config.stage(name).training == config.hardware_search.training}
    too_large = {name for name in kept if kept[name] > room}
    assert too_large <= {"hardware_search"} and recomputed == (alike if too_large else set())


def test_equal_candidates_are_counted_once():
    """As the stages do it: new_block repeats two blocks, and one point of the grid is the block as it was before."""
    config, teacher = from_teacher(jet_nemotron_2b()), qwen2_5_1_5b()
    stages = {stage.stage: stage for stage in estimate_run(config, teacher).stages}
    assert {run.name: run.reused_from for run in stages["new_block"].runs} == {
        "gated_delta_net": "block_selection",
        "jet": "block_selection",
    }
    assert (stages["new_block"].jobs, stages["new_block"].tokens, stages["new_block"].gpu_hours) == (0, 0, 0)
    reused = [run.name for run in stages["hardware_search"].runs if run.reused_from]
    assert reused == ["192x384x4"]
    assert stages["hardware_search"].tokens == 8 * config.hardware_search.training.tokens
    # Another training, another evaluation, or an earlier stage that the run leaves out: nothing to take over.
    longer = config.new_block.training.replace(steps=config.new_block.training.steps + 1)
    for changed in (
        config.replace(new_block=config.new_block.replace(training=longer)),
        config.replace(new_block=config.new_block.replace(eval=config.new_block.eval.replace(samples=8))),
        config.replace(stages=tuple(stage for stage in config.stages if stage != "block_selection")),
    ):
        stages = {stage.stage: stage for stage in estimate_run(changed, teacher).stages}
        assert stages["new_block"].jobs == 2


def test_candidates_that_stage_1_continues_are_all_trained():
    """A result taken over has no weights; the stage would find out after days."""
    config = jet_nemotron_2b()
    assert config.stage1.init == "search"
    stages = {stage.stage: stage for stage in estimate_run(config, qwen2_5_1_5b()).stages}
    assert (stages["new_block"].jobs, stages["hardware_search"].jobs) == (0, 9)
    shorter = config.replace(stages=("prepare", "placement", "block_selection", "new_block", "stage1"))
    stages = {stage.stage: stage for stage in estimate_run(shorter, qwen2_5_1_5b()).stages}
    assert stages["new_block"].jobs == 2


def test_candidates_cost_what_their_own_sizes_cost():
    stages = {stage.stage: stage for stage in estimate_run(jet_nemotron_2b(), qwen2_5_1_5b()).stages}
    hours = {run.name: run.gpu_hours for run in stages["hardware_search"].runs}
    assert hours["64x384x12"] > 1.2 * hours["256x288x4"] > 0
    assert sum(hours.values()) == pytest.approx(stages["hardware_search"].gpu_hours)
    static = tiny().replace(new_block=tiny().new_block.replace(candidates=("jet_static",)))
    with pytest.raises(UserError, match="all are ablations"):
        planned_student(static, qwen2_5_1_5b())


def test_a_loss_on_features_alone_needs_no_logits():
    student, teacher, training = jet_nemotron_2b_model(), qwen2_5_1_5b(), jet_nemotron_2b().stage1.training
    assert training.loss.needs_logits
    features = training.replace(loss=LossConfig(feature=1.0))
    assert training_memory(student, teacher, features, ParallelConfig(), "bf16", 32).logits == 0
    heads = 2 * 2 * student.hidden_size * student.vocab_size + 2 * teacher.hidden_size * teacher.vocab_size
    spared = training_flops_per_token(student, teacher, training) - training_flops_per_token(student, teacher, features)
    assert spared == pytest.approx(heads)


def test_logits_are_counted_with_one_chunk_of_the_losses():
    student, training = jet_nemotron_2b_model(), jet_nemotron_2b().stage1.training
    one = training_memory(student, student, training.replace(micro_batch_size=1), ParallelConfig(), "bf16", 32).logits
    chunk = LOGIT_CHUNK_TOKENS * student.vocab_size * 4 * LOGIT_CHUNK_TENSORS
    assert one == 2 * 4096 * student.vocab_size * 2 + chunk
    plain = training.replace(micro_batch_size=1, loss=LossConfig(cross_entropy=1.0))
    assert training_memory(student, None, plain, ParallelConfig(), "bf16", 32).logits == one - 4096 * (
        student.vocab_size * 2
    )
    # The chunk is the same for any batch; the logits are turned around nowhere.
    large = training_memory(student, student, training.replace(micro_batch_size=64), ParallelConfig(), "bf16", 32)
    assert large.logits == 2 * 64 * 4096 * student.vocab_size * 2 + chunk


def test_gpu_hours_scale_with_tokens_and_speed():
    run = estimate_run(jet_nemotron_2b(), qwen2_5_1_5b())
    by_name = {stage.stage: stage for stage in run.stages}
    assert by_name["hardware_search"].jobs == 9 and by_name["placement"].jobs == 1
    assert by_name["stage2"].tokens == pytest.approx(350e9, rel=1e-5)
    faster = estimate_run(jet_nemotron_2b(), qwen2_5_1_5b(), utilisation=0.7)
    for slow, fast in zip(run.stages, faster.stages):
        assert fast.gpu_hours == pytest.approx(slow.gpu_hours / 2)
    # Within a factor of three of the paper's hours: it reached 15 to 36% of the peak, by its own stages.
    for stage in ("placement", "stage1", "stage2", "hardware_search"):
        assert by_name[stage].paper_gpu_hours / 3 < by_name[stage].gpu_hours < by_name[stage].paper_gpu_hours
    assert run.disk_bytes == sum(stage.disk_bytes for stage in run.stages)


def estimate(*arguments: str) -> tuple[int, str, str]:
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def test_tool_is_fast_and_needs_no_torch(tmp_path):
    blocked = (
        "import sys, runpy\n"
        "for name in ('torch', 'megatron', 'transformers', 'numpy'): sys.modules[name] = None\n"
        f"sys.argv = ['estimate.py', 'jet_nemotron_2b']\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    start = os.times()
    result = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, cwd=tmp_path)
    end = os.times()
    assert result.returncode == 0, result.stderr
    # Processor time, which a busy machine does not stretch.
    assert end.children_user + end.children_system - start.children_user - start.children_system < 2.0
    assert "1.965B parameters" in result.stdout and "157.2 MiB" in result.stdout
    assert "1,792.0 MiB" in result.stdout and "7,536" in result.stdout


def test_tool_reads_config_json_files_and_directories(tmp_path):
    for name, build in KNOWN_MODELS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(model_to_hf(build())))
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([str(tmp_path / "Jet-Nemotron-4B")]) == 0
    code, out, _ = estimate(str(tmp_path / "Jet-Nemotron-2B" / "config.json"), "--context", "65536", "--json")
    cost = json.loads(out)["models"]["config.json"]
    assert (code, cost["total_params"], cost["cache_bytes"]) == (0, 1964806208, 157.25 * MIB)


def test_tool_in_process(capsys, tmp_path):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main(["Jet-Nemotron-4B"]) == 0
    out = capsys.readouterr().out
    assert "3.960B parameters" in out and "258.0 MiB" in out
    assert main(["jet_nemotron_2b", "--json", "--utilisation", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["models"]) == {"teacher", "jet_nemotron_2b (planned student)"}
    assert report["stages"][-2]["stage"] == "stage2" and report["stages"][-2]["memory"]["total"] > 0
    for arguments in (["jet_nemotron_2b", "--context", "0"], ["jet_nemotron_2b", "--utilisation", "2"], []):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2' is not supported"),
        ('{"model_type": "qwen2", "hidden_size": 8}', "num_attention_heads"),
    ],
)
def test_tool_on_bad_files(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    code, _, err = estimate(str(path))
    assert code == 1
    assert err.startswith("error: ") and message in err and len(err.strip().splitlines()) == 1


def test_tool_names_an_unknown_recipe():
    code, _, err = estimate("jet_nemotron_3b")
    assert code == 2 and "unknown recipe 'jet_nemotron_3b'; known: tiny" in err


def test_formats():
    assert [format_bytes(n) for n in (0, 9999, 10_000, 1792 * MIB, 15 << 30)] == [
        "0 B",
        "9999 B",
        "9.8 KiB",
        "1,792.0 MiB",
        "15.0 GiB",
    ]
    assert [format_count(n) for n in (12, 2030, 2_030_000, 1_964_806_208, 4e12)] == [
        "12",
        "2.0K",
        "2.03M",
        "1.965B",
        "4.00T",
    ]
    assert [format_seconds(n) for n in (4, 89, 100, 7200, 200_000)] == ["4 s", "89 s", "2 min", "2.0 h", "2.3 days"]
    lines = table(("a", "b"), [("x", "10"), ("long", "7")]).splitlines()
    assert lines == ["a      b", "----  --", "x     10", "long   7"]


def test_import_of_the_tool_has_no_side_effects():
    before = dict(os.environ)
    runpy.run_path(str(SCRIPT))
    assert dict(os.environ) == before
