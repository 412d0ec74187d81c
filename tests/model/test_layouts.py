"""The same model, weights and step at every layout: losses, features and gradients agree with one process."""

import pytest
import torch

from layout_runs import relative_error, train_step
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.model.builder import build_model
from megatron_jet.model.param_table import param_table
from megatron_jet.model.state import gather_tensors
from megatron_jet.training.checkpoint import load_model, save_model
from mixers.mixer_cases import KINDS, model_with, model_with_every_mixer

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2_vpp3": ParallelConfig(pipeline=2, virtual_pipeline=3),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2_sp_pp2": ParallelConfig(tensor=2, sequence_parallel=True, pipeline=2),
}
# Layouts differ in the order of sums only. Moving every weight by one unit in the last place changes activations of
# these models by up to 1e-6 and single gradients by up to 5e-5 (measured): twice the latter is the bound.
TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-4


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 18), generator=torch.Generator().manual_seed(2))


def moved_weights(model) -> dict[str, torch.Tensor]:
    """Initial weights with noise: as they start, some parameters (JetBlock's generator) get no gradient at all."""
    generator = torch.Generator().manual_seed(5)
    tensors = gather_tensors(build_model(model, ParallelConfig()))
    return {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The step at one process, and the checkpoint of its weights."""
    from megatron_jet.training.parallel import destroy_parallel, init_parallel

    path = str(tmp_path_factory.mktemp("layouts") / "model")
    init_parallel(ParallelConfig(), seed=0)
    model = model_with_every_mixer()
    step = train_step(model, ParallelConfig(), tokens(), tensors=moved_weights(model), save_to=path)
    destroy_parallel()
    return step, path


def test_every_mixer_takes_part():
    assert {entry.partition(":")[0] for entry in model_with_every_mixer().layer_plan} == set(KINDS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(pool, reference, name):
    """A checkpoint saved by one process gives the same loss, logits, features and gradients at this layout."""
    expected, path = reference
    layout = LAYOUTS[name]
    step = pool.run(train_step, model_with_every_mixer(), layout, tokens(), load_from=path, layout=layout)[0]
    assert step.loss == pytest.approx(expected.loss, abs=1e-6)
    torch.testing.assert_close(step.logits, expected.logits, atol=TOLERANCE, rtol=TOLERANCE)
    assert set(step.hidden) == set(expected.hidden)
    for layer, hidden in expected.hidden.items():
        torch.testing.assert_close(step.hidden[layer], hidden, atol=TOLERANCE, rtol=TOLERANCE)
    assert set(step.grads) == set(expected.grads)
    assert all(grad.norm() > 0 for grad in expected.grads.values())
    errors = {key: relative_error(step.grads[key], grad) for key, grad in expected.grads.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < GRADIENT_TOLERANCE, (worst, errors[worst])


def save_and_gather(model, layout, path: str, init_seed: int) -> dict | None:
    chunks = build_model(model, layout, init_seed=init_seed)
    save_model(chunks, path)
    return gather_tensors(chunks)


def load_and_gather(model, layout, path: str) -> dict | None:
    chunks = build_model(model, layout, init_seed=None)
    load_model(chunks, path)
    return gather_tensors(chunks)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_checkpoints_reshard_bit_exactly(pool, tmp_path, untied):
    """Initial weights do not depend on the layout, and survive saving at one and loading at others."""
    model = model_with_every_mixer().replace(tie_word_embeddings=not untied)
    path = str(tmp_path / "model")
    first = LAYOUTS["tp2_pp2"]
    saved = pool.run(save_and_gather, model, first, path, init_seed=7, layout=first)[0]
    plain = pool.run(save_and_gather, model, ParallelConfig(), str(tmp_path / "plain"), init_seed=7, world_size=1)[0]
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == {
        row.key: row.global_shape for row in param_table(model)
    }
    others = [plain]
    for layout in (ParallelConfig(), LAYOUTS["tp2_sp"], ParallelConfig(pipeline=2, virtual_pipeline=3)):
        others.append(pool.run(load_and_gather, model, layout, path, layout=layout)[0])
    for other in others:
        assert set(other) == set(saved)
        assert all(torch.equal(other[key], tensor) for key, tensor in saved.items())


@pytest.mark.parametrize(("heads", "ranks"), [(3, 3), (12, 4)])
def test_other_head_counts(pool, single_rank, heads, ranks):
    """Head counts that are no powers of two, at every rank count that divides them."""
    mixer = {"num_heads": heads, "head_dim": 6, "expand_v": 1.5, "conv_size": 2}
    mixers = {"jet": mixer | {"dconv_generator_reduction": 3}, "gated_delta_net": mixer}
    mixers["gla"] = {"num_heads": heads, "head_dim": 6, "expand_v": 0.5}
    changes = {"num_attention_heads": heads, "num_key_value_heads": heads, "mixers": mixers, "vocab_size": 72}
    model = model_with("jet", "gated_delta_net", "gla", "swa:4", hidden_size=36, **changes)
    layout = ParallelConfig(tensor=ranks, sequence_parallel=True)
    weights = moved_weights(model)
    one = train_step(model, single_rank, tokens()[:, :12], tensors=weights)
    many = pool.run(train_step, model, layout, tokens()[:, :12], tensors=weights, layout=layout)[0]
    torch.testing.assert_close(many.logits, one.logits, atol=TOLERANCE, rtol=TOLERANCE)
    for key, grad in one.grads.items():
        assert relative_error(many.grads[key], grad) < GRADIENT_TOLERANCE, key


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, {"tensor": 4}, "6 heads do not divide"),
        ({"vocab_size": 63}, {"tensor": 2}, "vocab_size=63 does not divide"),
        ({"intermediate_size": 47}, {"tensor": 2}, "intermediate_size=47 does not divide"),
        ({}, {"pipeline": 4}, "num_layers=6 does not divide"),
        ({}, {"pipeline": 2, "virtual_pipeline": 2}, "num_layers=6 does not divide"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(changes, layout, message):
    with pytest.raises(UserError, match=message):
        build_model(model_with_every_mixer().replace(**changes), ParallelConfig(**layout))
