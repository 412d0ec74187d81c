"""Distillation gives the same losses and the same gradients at every layout."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_jet.configs.mixers.gated_delta_net import GatedDeltaNetConfig
from megatron_jet.configs.training import LossConfig, OptimizerConfig, ParallelConfig
from megatron_jet.training.distill import DistillationModel, share_frozen_tensors
from megatron_jet.training.freezing import freeze, named_parameters
from megatron_jet.training.losses import feature_loss, layer_weights
from megatron_jet.training.optimizer import Optimizer, wrap_data_parallel
from megatron_jet.training.steps import named_terms, normalizer, run_microbatches
from training.training_cases import (
    DISTILL,
    MIXERS,
    SEQ,
    batches_for,
    built,
    copy_weights,
    full_gradients,
    student_config,
    teacher_config,
)

LAYOUTS = {
    "tp2": (ParallelConfig(tensor=2), 2),
    "tp2 sp": (ParallelConfig(tensor=2, sequence_parallel=True), 2),
    "pp2": (ParallelConfig(pipeline=2), 2),
    "pp2 vpp2": (ParallelConfig(pipeline=2, virtual_pipeline=2), 2),
    "dp2": (ParallelConfig(), 2),
    "tp2 pp2 sp": (ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True), 4),
    "dp2 pp2": (ParallelConfig(pipeline=2), 4),
}
OVERLAPPED = {
    "dp2 pp2 vpp2": (ParallelConfig(pipeline=2, virtual_pipeline=2), 4),
    "dp2 tp2 sp": (ParallelConfig(tensor=2, sequence_parallel=True), 4),
}
MICROBATCHES = 4
LOSSES = {
    "all": DISTILL,
    "features": LossConfig(feature=1.0, layer_weights=(1.0, 0.0, 2.0, 1.0)),
    "first stage": LossConfig(feature=1.0, layer_weights=(1.0, 1.0, 0.0, 0.0)),
    "soft reverse": LossConfig(kl=1.0, kl_direction="reverse", temperature=2.0),
    "plain": LossConfig(cross_entropy=1.0),
}


def one_step(parallel: ParallelConfig, loss: LossConfig, patterns: tuple[str, ...] = ("*",), recompute: bool = False):
    """Losses and full gradients of one global batch of four micro-batches."""
    model = student_config()
    student = built(model, parallel, seed=2, recompute=recompute)
    teacher = built(teacher_config(), parallel, seed=1) if loss.needs_teacher else [None] * len(student)
    freeze(student, patterns)
    models = [DistillationModel(s, t, loss, model.num_layers) for s, t in zip(student, teacher)]
    models = wrap_data_parallel(models, distributed_optimizer=False)
    for chunk in models:
        chunk.zero_grad_buffer()
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = batches_for(dp_rank, dp_size, MICROBATCHES // dp_size)
    terms = run_microbatches(models, batches, normalizer(batches), forward_only=False)
    evaluated = run_microbatches(models, batches, normalizer(batches), forward_only=True)
    return named_terms(terms), named_terms(evaluated), full_gradients(student)


@pytest.fixture(scope="module")
def expected(pool):
    return {name: pool.run(one_step, ParallelConfig(), loss, world_size=1)[0] for name, loss in LOSSES.items()}


def check(got, expected) -> None:
    """fp32: sums of some 1000 products in another order differ by about 1e-6 of their size.

    The KL's gradient is a difference of nearly equal probabilities and the decay's a sum that cancels: two digits more.
    """
    terms, evaluated, gradients = got[0]
    assert terms == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    assert all(rank[0] == pytest.approx(terms, rel=1e-6) for rank in got)
    assert evaluated == pytest.approx(terms, rel=1e-6)
    assert gradients.keys() == expected[2].keys()
    for key, gradient in expected[2].items():
        error = (gradients[key] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < 1e-4, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_terms(pool, expected, layout):
    parallel, world_size = LAYOUTS[layout]
    check(pool.run(one_step, parallel, DISTILL, layout=parallel, world_size=world_size), expected["all"])


@pytest.mark.parametrize("name", ["features", "first stage", "soft reverse", "plain"])
@pytest.mark.parametrize("layout", ["tp2 sp", "pp2"])
def test_single_terms(pool, expected, layout, name):
    parallel, world_size = LAYOUTS[layout]
    check(pool.run(one_step, parallel, LOSSES[name], layout=parallel, world_size=world_size), expected[name])


def test_features_alone_train_the_first_stage(expected):
    """Layer 0's own feature is the only reason for its weights to move when later layers have no weight."""
    gradients = expected["features"][2]
    assert gradients["decoder.layers.0.self_attention.in_proj.weight.query"].norm() > 1e-4


@pytest.mark.parametrize("name, student_runs, teacher_runs", [("features", 0, 0), ("all", 1, 1), ("plain", 1, 0)])
def test_heads_run_only_where_their_logits_are_needed(single_rank, name, student_runs, teacher_runs):
    loss = LOSSES[name]
    student = built(student_config(), seed=2)
    teacher = built(teacher_config(), seed=1) if loss.needs_teacher else [None]
    runs = []
    for model in filter(None, (*student, *teacher)):
        model.output_layer.register_forward_hook(lambda module, *_: runs.append(module))
    [batch] = batches_for(0, 1, 1)
    DistillationModel(student[0], teacher[0], loss, 4)(batch, normalizer([batch])).backward()
    assert runs.count(student[0].output_layer) == student_runs
    assert len(runs) == student_runs + teacher_runs


def test_frozen_parameters_get_no_gradient(pool, expected):
    """Frozen below and between: the pipeline still carries gradients to the parts that train."""
    patterns = ("*.self_attention.*", "!*.linear_*")
    parallel = ParallelConfig(pipeline=2)
    *_, gradients = pool.run(one_step, parallel, DISTILL, patterns, layout=parallel)[0]
    kept = {
        key: value for key, value in expected["all"][2].items() if "self_attention" in key and ".linear_" not in key
    }
    assert gradients.keys() == kept.keys()
    for key, gradient in kept.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6)


def reduced_gradients(parallel: ParallelConfig, distributed: bool, overlap: bool) -> tuple[list, dict, int]:
    """Gradient norms of two steps, the weights after them, and the number of buckets of the first chunk."""
    model = student_config()
    student, teacher = built(model, parallel, seed=2), built(teacher_config(), parallel, seed=1)
    freeze(student, ("*", "!*.mlp.*"))
    models = [DistillationModel(s, t, DISTILL, model.num_layers) for s, t in zip(student, teacher)]
    models = wrap_data_parallel(models, distributed_optimizer=distributed, overlap=overlap, bucket_size=1500)
    optimizer = Optimizer(models, OptimizerConfig(lr=1e-2, clip_grad=1.0), dtype=torch.float32, distributed=distributed)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches, norms = batches_for(dp_rank, dp_size, 2), []
    for _ in range(2):
        optimizer.zero_grad()
        run_microbatches(models, batches, normalizer(batches), forward_only=False)
        norms.append(optimizer.gradient_norm())
        optimizer.apply(1e-2)
    weights = {name: p.detach().clone() for name, p in named_parameters(student)}
    return norms, weights, sum(len(buffer.buckets) for buffer in models[0].buffers)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("layout", ["dp2", "dp2 pp2", "dp2 pp2 vpp2", "dp2 tp2 sp"])
def test_overlapped_reduction_gives_the_same_weights(pool, layout, distributed):
    parallel, world_size = OVERLAPPED.get(layout) or LAYOUTS[layout]
    plain, overlapped = (
        pool.run(reduced_gradients, parallel, distributed, overlap, layout=parallel, world_size=world_size)
        for overlap in (False, True)
    )
    assert overlapped[0][2] > plain[0][2]
    for (norms, weights, _), (expected_norms, expected, _) in zip(overlapped, plain):
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        for name in expected:
            # The norm that gradients are clipped to is summed in another order: rounding, of which Adam makes more.
            assert (weights[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("static", [False, True])
def test_every_mixer_gives_all_its_weights_a_gradient(single_rank, static):
    """All that train: overlapped reduction on several ranks waits for every one of them."""
    delta = GatedDeltaNetConfig(num_heads=2, head_dim=8, expand_v=1.0)
    mixers = MIXERS | {"jet": MIXERS["jet"].replace(static_kernel=static), "gated_delta_net": delta}
    model = student_config(("jet", "gated_delta_net", "gla", "swa:8"), qkv_bias=True, mixers=mixers)
    student, teacher = built(model, seed=2), built(teacher_config(), seed=1)
    freeze(student, ("*",))
    [batch] = batches_for(0, 1, 1)
    DistillationModel(student[0], teacher[0], DISTILL, 4)(batch, normalizer([batch])).backward()
    trained = {name: parameter for name, parameter in named_parameters(student) if parameter.requires_grad}
    assert any("kernel_w1" in name for name in trained) != static
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []


def test_recomputation_changes_nothing(pool, expected):
    got = pool.run(one_step, ParallelConfig(), DISTILL, recompute=True, world_size=1)
    check(got, expected["all"])


def test_feature_loss_is_squared_error_over_the_token_s_variance():
    student, teacher = torch.randn(3, 2, 8), torch.randn(3, 2, 8) * 5 + 1
    expected = sum(
        ((student[i, j] - teacher[i, j]) ** 2).mean() / teacher[i, j].var(unbiased=False)
        for i in range(3)
        for j in range(2)
    )
    torch.testing.assert_close(feature_loss(student, teacher), expected)
    assert feature_loss(teacher, teacher) == 0


def test_layer_weights_sum_to_one():
    assert layer_weights(LossConfig(feature=1.0), 4) == (0.25,) * 4
    assert layer_weights(LOSSES["features"], 4) == (0.25, 0.0, 0.5, 0.25)
    with pytest.raises(Exception, match="layer_weights has 4 values, the model has 3"):
        layer_weights(LOSSES["features"], 3)


def test_teacher_shares_frozen_storage(single_rank):
    teacher, student = built(teacher_config(), seed=1), built(student_config(), seed=2)
    copy_weights(teacher, student)
    freeze(student, ("*.self_attention.*",))
    tokens = batches_for(0, 1, 1)[0]["tokens"]
    positions = torch.arange(SEQ).expand_as(tokens)
    with torch.no_grad():
        before = teacher[0](tokens, positions, None)
        saved = share_frozen_tensors(student, teacher)
        after = teacher[0](tokens, positions, None)
    mlp = [layer.mlp.linear_fc1.weight for model in (student[0], teacher[0]) for layer in model.decoder.layers]
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(mlp[:4], mlp[4:]))
    assert saved > sum(weight.nbytes for weight in mlp[:4])
    assert torch.equal(before, after)
