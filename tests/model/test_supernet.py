"""Supernet layers: one path runs, the others cost nothing; models inside a supernet equal the models themselves."""

import pytest
import torch

from layout_runs import next_token_loss
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.model import stepwise
from megatron_jet.model.builder import build_model
from megatron_jet.model.features import collect_features
from megatron_jet.model.paths import (
    choice_mixers,
    extract_plan,
    idle_parameters,
    insert_plan,
    set_paths,
    supernet_table,
)
from megatron_jet.model.state import gather_tensors, load_tensors
from mixers.mixer_cases import model_with

CHOICES = (("attn", "gla", "swa:5"), ("attn", "gla", "swa:3", "swa:5"), ("attn", "jet"), ("attn", "gated_delta_net"))
PLANS = [
    ("gla", "attn", "jet", "gated_delta_net"),
    ("swa:5", "swa:3", "attn", "attn"),
    ("attn", "gla", "jet", "attn"),
]


def base():
    return model_with("attn", "attn", "attn", "attn")


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(4))


def test_supernet_table_covers_every_tensor(single_rank):
    chunks = build_model(base(), single_rank, choices=CHOICES)
    tensors = gather_tensors(chunks)
    rows = {row.key: row for row in supernet_table(base(), CHOICES)}
    assert set(rows) == set(tensors)
    assert all(rows[key].global_shape == tuple(tensor.shape) for key, tensor in tensors.items())
    names = [name for row in rows.values() for name in row.hf]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_selected_paths_equal_the_plain_model(single_rank, plan):
    """Logits equal those of a model built with the plan, from the same weights and from the same seed."""
    supernet = build_model(base(), single_rank, choices=CHOICES)
    set_paths(supernet, plan)
    logits = supernet[0](tokens(), None, None)
    model = base().with_plan(plan)
    same_seed = build_model(model, single_rank)
    assert torch.equal(same_seed[0](tokens(), None, None), logits)
    extracted = build_model(model, single_rank, init_seed=None)
    tensors = extract_plan(gather_tensors(supernet), plan)
    load_tensors(extracted, tensors)
    assert torch.equal(extracted[0](tokens(), None, None), logits)
    assert set(extract_plan(insert_plan(tensors, plan), plan)) == set(tensors)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_idle_paths_get_no_gradient(single_rank, plan):
    supernet = build_model(base(), single_rank, choices=CHOICES)
    set_paths(supernet, plan)
    next_token_loss(supernet[0](tokens(), None, None), tokens()).backward()
    idle = {id(parameter) for parameter in idle_parameters(supernet)}
    without = {id(parameter) for parameter in supernet[0].parameters() if parameter.grad is None}
    assert idle == without and idle


def test_layer_by_layer_equals_the_whole(single_rank):
    """The search's forward: embed, layers with paths given one by one, head at some positions."""
    supernet = build_model(base(), single_rank, choices=CHOICES)
    set_paths(supernet, PLANS[0])
    with torch.no_grad(), collect_features(supernet) as features:
        whole = supernet[0](tokens(), None, None)
    set_paths(supernet, PLANS[1])
    hidden = stepwise.embed(supernet[0], tokens())
    with torch.no_grad():
        for layer, path in enumerate(PLANS[0]):
            hidden = stepwise.run_layer(supernet[0], layer, hidden, path)
            assert torch.equal(hidden, features[layer])
        assert torch.equal(stepwise.head(supernet[0], hidden), whole)
        some = torch.tensor([3, 19])
        torch.testing.assert_close(stepwise.head(supernet[0], hidden[some]), whole[:, some])


def run_plan(layout: ParallelConfig, plan: tuple[str, ...]):
    """Supernet forward of one plan at a layout without pipeline: full logits, and the selected paths."""
    supernet = build_model(base(), layout, choices=CHOICES)
    set_paths(supernet, plan)
    if layout.pipeline > 1:
        return {layer: mixer.selected for layer, mixer in choice_mixers(supernet)}
    return stepwise.run_all(supernet[0], tokens())


def test_supernet_at_other_layouts(pool, single_rank):
    for plan in PLANS:
        expected = run_plan(single_rank, plan)
        layout = ParallelConfig(tensor=2, sequence_parallel=True)
        for logits in pool.run(run_plan, layout, plan, layout=layout):
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    layout = ParallelConfig(pipeline=2)
    stages = pool.run(run_plan, layout, PLANS[0], layout=layout)
    assert stages == [{0: "gla", 1: "attn"}, {2: "jet", 3: "gated_delta_net"}]


def test_features_keep_their_gradient_under_recomputation(single_rank):
    """A loss on features alone reaches the first layer, recomputed or not, with the same gradient."""
    grads = []
    for recompute in (False, True):
        chunks = build_model(base(), single_rank, recompute=recompute)
        chunks[0].embedding.requires_grad_(False)
        with collect_features(chunks) as features:
            chunks[0](tokens(), None, None)
        sum((hidden**2).mean() for hidden in features.values()).backward()
        grads.append(chunks[0].decoder.layers[0].self_attention.linear_qkv.weight.grad)
        assert sorted(features) == [0, 1, 2, 3]
    assert grads[0].abs().sum() > 0 and torch.equal(*grads)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (CHOICES[:3], "3 layers but the model has 4"),
        ((*CHOICES[:3], ("gated_delta_net", "swa:3")), "'swa:3' needs 'attn'"),
        ((*CHOICES[:3], ("gated_delta_net",)), "without the layer plan's 'attn'"),
        ((*CHOICES[:3], ("attn", "swa:0")), "window of 1 or more"),
        ((*CHOICES[:3], ("attn", "mamba")), "unknown mixer 'mamba'"),
    ],
)
def test_choices_that_do_not_fit_are_refused(single_rank, choices, message):
    with pytest.raises(UserError, match=message):
        build_model(base(), single_rank, choices=choices)


def test_unknown_path_is_refused(single_rank):
    supernet = build_model(base(), single_rank, choices=CHOICES)
    with pytest.raises(ValueError, match="no path 'jet'"):
        set_paths(supernet, ("jet", "attn", "attn", "attn"))
