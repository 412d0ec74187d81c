"""Recipes build, survive YAML, and take typed overrides."""

import sys

import pytest
import yaml

from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.layer_plan import hybrid_plan
from megatron_jet.configs.mixers.jet_block import JetBlockConfig
from megatron_jet.configs.overrides import apply_overrides, dump_yaml, load_yaml, parse_value
from megatron_jet.configs.recipes.catalog import RECIPES, load_recipe
from megatron_jet.configs.recipes.distill import jet_nemotron_2b_distill, jet_nemotron_4b_distill
from megatron_jet.configs.recipes.jet_nemotron import jet_nemotron_2b, jet_nemotron_4b
from megatron_jet.configs.recipes.known_models import (
    jet_nemotron_2b_model,
    jet_nemotron_4b_model,
    qwen2_5_1_5b,
    qwen2_5_3b,
)
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.stages import SEARCH_STAGES, SELECTION_STAGES, STAGE_ORDER


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_yaml(name, tmp_path):
    config = load_recipe(name)
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_recipe(str(path)) == config
    assert config.recipe == name
    assert dump_yaml(load_recipe(str(path))) == path.read_text()


def test_paper_recipe_holds_the_published_figures():
    config = jet_nemotron_2b()
    tokens = {stage: config.stage(stage).training.tokens for stage in ("placement", "stage1", "stage2")}
    assert tokens == {stage: pytest.approx(n, rel=1e-5) for stage, n in zip(tokens, (50e9, 50e9, 350e9))}
    assert {point.state_size for point in config.hardware_search.grid} == {294_912, 256 * 144 * 8} == {294_912}
    assert len(config.hardware_search.grid) == 9
    hours = [config.stage(name).resources.paper_gpu_hours for name in STAGE_ORDER[1:7]]
    assert hours == [808, 3120, 624, 5616, 624, 7536]
    assert config.nproc * config.stage1.resources.nodes == 32


@pytest.mark.parametrize("build", [jet_nemotron_2b, jet_nemotron_4b])
def test_paper_recipes_fit_together(build):
    """The published block is in the grid, and so is the size that all candidates have before; all stages are scored
    on as many samples; the supernet mostly sees as many full layers as it is to place."""
    config = build()
    jet = (jet_nemotron_2b_model if build is jet_nemotron_2b else jet_nemotron_4b_model)().mixers["jet"]
    state = jet.num_heads * jet.head_dim * jet.head_v_dim
    assert {point.state_size for point in config.hardware_search.grid} == {state}
    names = {point.name for point in config.hardware_search.grid}
    assert {size(jet), size(config.mixers["jet"])} < names
    assert config.hardware_search.expected == size(jet)
    scored = [stage for stage in STAGE_ORDER if hasattr(config.stage(stage), "eval")]
    assert scored == [*STAGE_ORDER[1:7], "evaluate"]
    assert {config.stage(stage).eval.samples for stage in scored} == {512}
    weights = config.placement.full_layers
    assert max(weights, key=weights.get) == config.placement.budget
    assert sum(n * w for n, w in weights.items()) == config.placement.budget * sum(weights.values())


def size(mixer) -> str:
    """As the grid names it."""
    return f"{mixer.head_dim}x{mixer.head_v_dim}x{mixer.num_heads}"


@pytest.mark.parametrize(("build", "plain"), [(jet_nemotron_2b, "192x384x4"), (jet_nemotron_4b, "256x512x4")])
def test_blocks_are_compared_at_one_size(build, plain):
    """Of two blocks with twice the parameters between them, the larger one wins, whatever it is."""
    config, teacher = build(), (qwen2_5_1_5b if build is jet_nemotron_2b else qwen2_5_3b)()
    candidates = {*config.block_selection.candidates, *config.new_block.candidates}
    assert candidates == {"gla", "gated_delta_net", "jet"}
    assert {size(config.mixers[name]) for name in candidates} == {plain}
    plan = hybrid_plan(teacher.num_layers, "gla", (14, 19), {20: 1152, 21: 1152})
    models = [
        teacher.with_plan(tuple(name if entry == "gla" else entry for entry in plan), {name: config.mixers[name]})
        for name in candidates
    ]
    mixers = [model_cost(model, 1).by_kind[model.layer_plan[0]].mixer_params for model in models]
    assert max(mixers) < 1.2 * min(mixers)


@pytest.mark.parametrize("name", RECIPES)
def test_stage_1_continues_the_winner_or_trains_like_the_search(name):
    """From the teacher's weights at less than the search's rate it could end below the candidate that won."""
    config = load_recipe(name)
    search = config.hardware_search.training.optimizer.lr
    assert {config.stage(stage).training.optimizer.lr for stage in SEARCH_STAGES} == {search}
    if config.student_plan is None:
        assert config.stage1.init == "search"
        assert config.stage1.training.optimizer.lr <= search
    else:
        assert config.stage1.init == "teacher" and config.stage1.training.optimizer.lr == search


@pytest.mark.parametrize("build", [jet_nemotron_2b_distill, jet_nemotron_4b_distill])
def test_published_models_are_distilled_at_their_published_size(build):
    config = build()
    published = {"jet_nemotron_2b_distill": jet_nemotron_2b_model, "jet_nemotron_4b_distill": jet_nemotron_4b_model}
    model = published[config.recipe]()
    assert (config.student_plan, config.mixers["jet"]) == (model.layer_plan, model.mixers["jet"])


def test_the_tiny_search_reads_no_clock():
    """Three runs with equal accuracies had three winners when measured speed decided."""
    config = tiny()
    for stage in SELECTION_STAGES:
        throughput = config.stage(stage).throughput
        assert throughput.mode == "analytic" and throughput.timed, "formulas decide; the clock is shown"


def test_a_search_to_continue_has_to_be_among_the_stages():
    """Found out here, not in the job that would read the winner's weights."""
    stages = ["stages=[prepare,placement,stage1,report]"]
    with pytest.raises(UserError, match=r"stage1.init=search continues .* stages has none; set stage1.init=teacher"):
        apply_overrides(tiny(), stages)
    assert apply_overrides(tiny(), [*stages, "stage1.init=teacher"]).stage1.init == "teacher"
    assert apply_overrides(tiny(), ["stages=[prepare,placement]"]).stages == ("prepare", "placement")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("2.5E6", 2.5e6),
        ("-1e-5", -1e-5),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        ("{recall: 1.0}", {"recall": 1.0}),
        ("bundled:tiny", "bundled:tiny"),
        ("/a path/with spaces", "/a path/with spaces"),
        ("e5", "e5"),
        ("", None),
        ("[a, b", "[a, b"),
    ],
)
def test_values_are_typed(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_overrides_reach_every_depth_and_leave_the_rest():
    changed = apply_overrides(
        tiny(),
        [
            "seed=7",
            "placement.training.optimizer.lr=1e-3",
            "placement.full_layers={0: 1, 2: 3}",
            "block_selection.candidates=[jet]",
            "data.blend={recall: 0.5, text: 0.5}",
            "mixers.jet.conv_size=3",
        ],
    )
    assert (changed.seed, changed.placement.training.optimizer.lr) == (7, 1e-3)
    assert changed.placement.full_layers == {0: 1.0, 2: 3.0}
    assert changed.block_selection.candidates == ("jet",)
    assert changed.data.blend == {"recall": 0.5, "text": 0.5}
    assert isinstance(changed.mixers["jet"], JetBlockConfig) and changed.mixers["jet"].conv_size == 3
    assert changed.stage1 == tiny().stage1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("placement.traning.steps=3", "unknown key 'placement.traning', did you mean 'training'?"),
        ("qqq=1", "unknown key 'qqq'; known: recipe, seed"),
        ("seed", "write key.sub=value"),
        ("=3", "write key.sub=value"),
        ("seed.deep=3", "seed has no keys"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("dtype=fp8", "dtype: Input should be 'fp32' or 'bf16'"),
        ("placement.full_layers={1: 0}", "give non-negative weights, at least one above 0"),
        ("placement.compare_training.loss.kl_direction=sideways", "Input should be 'forward' or 'reverse'"),
        ("stage1.training.validation_interval=null", "valid integer"),
        ("hardware_search.grid=[{d_k: 8, d_v: 8, heads: 2}, {d_k: 8, d_v: 8, heads: 4}]", "must be constant"),
        ("hardware_search.grid.0.d_k=8", "give the list as a whole"),
        ("placement.linear=mamba9", "'mamba9' has no entry in mixers"),
        ("placement.linear=jet_static", "placement.linear: 'jet_static' has no entry in mixers"),
        ("hardware_search.mixer=attn", "hardware_search.mixer: 'attn' has no entry in mixers"),
        ("mixers.attn={}", "mixers.attn: not a linear mixer"),
        ("stages=[placement, cooking]", "unknown stage 'cooking'"),
        ("placement.training.loss={feature: 0}", "every weight is 0"),
        ("parallel.sequence_parallel=true", "needs parallel.tensor above 1"),
    ],
)
def test_bad_overrides_are_one_line(override, message):
    with pytest.raises(UserError) as error:
        apply_overrides(tiny(), [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_key_that_is_not_set_is_given_as_a_whole():
    config = tiny()
    assert config.placement.resources.parallel is None
    with pytest.raises(UserError, match="placement.resources.parallel is not set; give it as a whole"):
        apply_overrides(config, ["placement.resources.parallel.tensor=2"])
    changed = apply_overrides(config, ["placement.resources.parallel={tensor: 2}"])
    assert changed.placement.resources.parallel.tensor == 2


def test_yaml_file_errors_name_the_file(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2\nb: 3\n")
    with pytest.raises(UserError, match=r"bad\.yaml: not valid YAML .*line 2"):
        load_yaml(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bad.yaml: "):
        load_yaml(bad)
    bad.write_text("just text")
    with pytest.raises(UserError, match="bad.yaml: "):
        load_recipe(str(bad))


def test_yaml_runs_no_code(tmp_path):
    marker = tmp_path / "executed"
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"!!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(UserError):
        load_yaml(bad)
    assert not marker.exists()


def test_unknown_keys_in_a_file_are_errors(tmp_path):
    data = yaml.safe_load(dump_yaml(tiny()))
    data["placement"]["beam_wdith"] = 3
    with pytest.raises(UserError, match="placement.beam_wdith: unknown key, did you mean 'beam_width'"):
        RunConfig.parse(data, "x.yaml")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n", "own_recipe fails: SyntaxError: invalid syntax"),
        ("1 / 0\n", "own_recipe fails: ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "cannot import own_recipe"),
        ("def f():\n    raise KeyError('two\\nlines')\n", "the function fails: KeyError: "),
        ("f = 3\n", "has no function 'f'"),
        ("def f():\n    return {}\n", "returned dict, not RunConfig"),
    ],
)
def test_own_recipe_that_fails_is_one_line_with_the_place(source, message, tmp_path, monkeypatch):
    (tmp_path / "own_recipe.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_recipe", raising=False)
    with pytest.raises(UserError) as caught:
        load_recipe("own_recipe:f")
    text = str(caught.value)
    assert message in text and "\n" not in text
    if " fails: " in text:
        assert f"own_recipe.py, line {len(source.splitlines())}" in text
