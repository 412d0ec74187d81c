"""Layouts, batches, patterns and weights of every training, before anything is started."""

import pytest

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.layout import check_layout
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.overrides import apply_overrides
from megatron_jet.configs.parameter_names import parameter_names
from megatron_jet.configs.recipes.catalog import RECIPES, load_recipe
from megatron_jet.configs.recipes.tiny import tiny
from megatron_jet.configs.teacher_source import teacher_model

TEACHER = teacher_model(tiny().teacher)
TWO = "nproc=2"
CHUNKS = "{pipeline: 2, virtual_pipeline: 2}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit(name):
    config = load_recipe(name)
    check_layout(config, teacher_model(config.teacher))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([TWO, "parallel={pipeline: 2, virtual_pipeline: 3}"], "placement: num_layers=8 does not divide by .*2\\*3"),
        (
            [TWO, "parallel={pipeline: 2, virtual_pipeline: 2}", "stage2.training.micro_batch_size=8"],
            "stage2.training.global_batch_size=8 makes 1 micro-batches .* multiple of parallel.pipeline=2",
        ),
        (
            [
                "nproc=2",
                "stage1.resources.parallel={pipeline: 2, virtual_pipeline: 2}",
                "stage1.training.global_batch_size=12",
            ],
            "stage1.training.global_batch_size=12 makes 3 micro-batches",
        ),
        (
            [TWO, "parallel={pipeline: 2, virtual_pipeline: 2}", "placement.compare_training.micro_batch_size=8"],
            "placement.compare_training.global_batch_size=8 makes 1",
        ),
        (["placement.compare_training.micro_batch_size=3"], "placement.compare_training.global_batch_size=8"),
        (
            ["placement.compare_training.seq_length=99999"],
            "compare_training.seq_length=99999: the teacher has",
        ),
        # Not the planned student's mixer, but that of a candidate, or of the supernet.
        (["mixers.gla.num_heads=3", TWO, "parallel.tensor=2"], "block_selection: gla: 3 heads"),
        (["mixers.gated_delta_net.num_heads=3", TWO, "parallel.tensor=2"], "placement: gated_delta_net: 3 heads"),
        (
            [TWO, "parallel.tensor=2", "hardware_search.grid=[{d_k: 8, d_v: 8, heads: 1}]"],
            "hardware_search: jet: 1 heads",
        ),
        (["nproc=3"], "nproc=3"),
        (["stage1.resources.parallel={tensor: 2}"], "stage1: 1 processes do not divide by tensor\\*pipeline=2"),
        (["placement.full_layers={9: 1}"], "placement.full_layers: 9 asked for, but the teacher has 8 layers"),
        (["stage2.training.loss.layer_weights=[1, 1]"], "stage2.training.loss.layer_weights has 2 values"),
        (["stage1.training.trainable=[qqq]"], "stage1.training.trainable: 'qqq' matches no parameter"),
        (["stage2.training.trainable=['*.mlp.*', '*.mpl.*']"], "stage2.training.trainable: '\\*.mpl.\\*' matches no"),
        (["stage1.training.trainable=['*', '!*']"], "leave nothing to train"),
        (["stage1.training.trainable=['!*.mlp.*']"], "leave nothing to train"),
        (["placement.training.trainable=['*.paths.jet.*']"], "'\\*.paths.jet.\\*' matches no parameter"),
        (["placement.compare_training.trainable=['*.paths.gated_delta_net.*']"], "compare_training.trainable: "),
        (["block_selection.training.trainable=['*.kernel_w1']"], "leave nothing to train"),  # gla has none
    ],
)
def test_what_does_not_fit_names_the_stage(overrides, message):
    with pytest.raises(UserError, match=message):
        check_layout(apply_overrides(tiny(), overrides), TEACHER)


@pytest.mark.parametrize(
    "overrides",
    [
        [TWO, "parallel={pipeline: 2, virtual_pipeline: 2}"],
        [TWO, "parallel.pipeline=2", "stage1.training.micro_batch_size=8"],  # idles, but works
        ["stage1.training.trainable=['*.in_proj.*', 'embedding.*', '!nothing']"],
        ["stages=[prepare, placement]", "stage1.training.trainable=[qqq]"],  # not among the stages
    ],
)
def test_what_fits(overrides):
    check_layout(apply_overrides(tiny(), overrides), TEACHER)


@pytest.mark.parametrize("entry", ["attn", "swa:8", "gla", "gated_delta_net", "jet"])
@pytest.mark.parametrize("traits", [{}, {"qk_norm": True, "qkv_bias": False, "tie_word_embeddings": False}])
def test_names_are_those_of_the_checkpoint(entry, traits):
    """Sections of one projection are one parameter there."""
    from megatron_jet.model.param_table import param_table

    model = ModelConfig.parse({**TEACHER.to_dict(), "mixers": tiny().to_dict()["mixers"], **traits})
    model = model.with_plan((entry,) * model.num_layers)
    keys = {row.key for row in param_table(model)}
    whole = {key[: key.index("in_proj.weight") + len("in_proj.weight")] if "in_proj" in key else key for key in keys}
    assert parameter_names(model) == whole
