"""Freezing, weight decay, clipping, schedules, and paths of a supernet that a step did not draw."""

import math

import pytest
import torch
from megatron.core import parallel_state

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import LossConfig, OptimizerConfig, ParallelConfig
from megatron_jet.model.paths import idle_parameters, set_paths
from megatron_jet.training.distill import DistillationModel
from megatron_jet.training.freezing import freeze, named_parameters, trains
from megatron_jet.training.optimizer import Optimizer, has_no_weight_decay, wrap_data_parallel
from megatron_jet.training.sampling import PathSampling
from megatron_jet.training.schedule import learning_rate
from megatron_jet.training.steps import normalizer, run_microbatches
from training.training_cases import (
    DISTILL,
    LINEAR_ONLY,
    batches_for,
    built,
    student_config,
    teacher_config,
)

ADAM = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.0)
PLAIN = LossConfig(cross_entropy=1.0)


def prepared(
    student, teacher=None, *, patterns=("*",), config=ADAM, distributed=False, dtype=torch.float32, loss=PLAIN
):
    """(wrapped models, optimiser)"""
    freeze(student, patterns)
    models = [DistillationModel(s, t, loss, 4) for s, t in zip(student, teacher or [None] * len(student))]
    models = wrap_data_parallel(models, distributed_optimizer=distributed)
    return models, Optimizer(models, config, dtype=dtype, distributed=distributed)


def step(models, optimizer, undrawn=(), batches=None, lr=1e-2) -> float:
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = batches or batches_for(rank, size, 2)
    optimizer.zero_grad()
    run_microbatches(models, batches, normalizer(batches), forward_only=False)
    norm = optimizer.gradient_norm()
    optimizer.apply(lr, undrawn)
    return norm


def test_patterns_decide_in_order():
    assert trains("a.b.weight", ("*",))
    assert not trains("a.b.weight", ("*", "!*.weight"))
    assert trains("a.b.weight", ("*", "!*.weight", "a.*"))
    assert not trains("c.weight", ("a.*",))


@pytest.mark.parametrize("distributed", [False, True])
def test_frozen_parameters_stay_and_have_no_state(single_rank, distributed):
    student = built(student_config())
    models, optimizer = prepared(student, patterns=LINEAR_ONLY, distributed=distributed)
    before = {name: parameter.detach().clone() for name, parameter in named_parameters(student)}
    for _ in range(2):
        step(models, optimizer)
    elements = sum(tensor.numel() for group in optimizer.megatron.param_groups for tensor in group["params"])
    assert elements == sum(p.numel() for _, p in named_parameters(student) if p.requires_grad)
    for name, parameter in named_parameters(student):
        assert torch.equal(before[name], parameter) == (not parameter.requires_grad), name
        assert parameter.requires_grad == ("self_attention" in name and "linear_" not in name)
        assert bool(optimizer.state_of(parameter)) == parameter.requires_grad
        assert hasattr(parameter, "main_grad") == parameter.requires_grad  # no gradient buffer, no communication


def test_nothing_to_train_is_an_error(single_rank):
    with pytest.raises(UserError, match="no parameter matches"):
        freeze(built(student_config()), ("*.typo.*",))


def freeze_all_but_last_layer(parallel: ParallelConfig) -> str:
    try:
        freeze(built(student_config(), parallel), ("decoder.layers.3.*",))
    except UserError as error:
        return str(error)
    return "no error"


def test_a_stage_without_anything_to_train_is_an_error_on_all_ranks(pool):
    parallel = ParallelConfig(pipeline=2)
    for message in pool.run(freeze_all_but_last_layer, parallel, layout=parallel):
        assert "pipeline stage" in message


@pytest.mark.parametrize("distributed", [False, True])
def test_equals_torch_adamw_without_decay_on_vectors(single_rank, distributed):
    """The whole path of Megatron's buffers and optimiser against torch on the same gradients."""
    student, twin = built(student_config()), built(student_config())
    models, optimizer = prepared(student, distributed=distributed, config=ADAM.replace(clip_grad=0.05))
    groups: dict[bool, list] = {True: [], False: []}
    for parameter in twin[0].parameters():
        groups[parameter.dim() <= 1].append(parameter)
    names = [name for name, p in twin[0].named_parameters() if has_no_weight_decay(p)]
    assert any("A_log" in n for n in names) and any("dt_bias" in n for n in names) and any("norm" in n for n in names)
    adam = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False], "weight_decay": 0.1}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    other = [DistillationModel(twin[0], None, PLAIN, 4)]
    for _ in range(3):
        norm = step(models, optimizer)
        adam.zero_grad()
        batches = batches_for(0, 1, 2)
        for batch in batches:
            other[0](batch, normalizer(batches)).backward()
        expected = torch.nn.utils.clip_grad_norm_(twin[0].parameters(), 0.05)
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        adam.step()
    for (name, a), (_, b) in zip(student[0].named_parameters(), twin[0].named_parameters()):
        # Adam divides by sqrt(v): where a gradient is rounding noise alone, its sign is too.
        error = (a - b).norm() / (b.norm() + 1e-8)
        assert error < 1e-4, f"{name} {error:.1e}"


def snapshot(student, optimizer) -> dict[str, tuple]:
    """Weights, moments and step count of every parameter, bit for bit."""
    return {
        name: (parameter.detach().clone(), {key: value.clone() for key, value in optimizer.state_of(parameter).items()})
        for name, parameter in named_parameters(student)
    }


def same(before: tuple, after: tuple) -> bool:
    (weight, state), (new_weight, new_state) = before, after
    return torch.equal(weight, new_weight) and all(torch.equal(state[key], new_state[key]) for key in state)


def undrawn_invariance(distributed: bool, dtype: str, linear: str) -> dict[str, list[str]]:
    """Three steps with different draws; names of parameters that moved, by expectation."""
    student = built(student_config(("attn",) * 4), choices=(("attn", linear),) * 4, dtype=dtype)
    teacher = built(teacher_config(), seed=5, dtype=dtype)
    models, optimizer = prepared(
        student,
        teacher,
        patterns=LINEAR_ONLY,
        distributed=distributed,
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        loss=DISTILL,
    )
    wrong = []
    for drawn in ((0, 2), (1, 2), (0, 1)):
        plan = tuple(linear if layer in drawn else "attn" for layer in range(4))
        set_paths(student, plan)
        before = snapshot(student, optimizer)
        # Between 4 and 8, where dt_bias may be, bf16 numbers are 1/32 apart: a smaller step would be rounded away.
        step(models, optimizer, undrawn=idle_parameters(student), lr=0.1)
        after = snapshot(student, optimizer)
        for name in before:
            layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else -1
            should_move = f".paths.{linear}." in name and layer in drawn
            if same(before[name], after[name]) == should_move:
                wrong.append(f"{plan} {name} should {'move' if should_move else 'stay'}")
    steps = {name.split(".")[2]: float(optimizer.state_of(p)["step"]) for name, p in named_parameters(student)
             if f"paths.{linear}.in_proj" in name and optimizer.state_of(p)}  # fmt: skip
    return {"wrong": wrong, "steps": steps}


@pytest.mark.parametrize("distributed", [False, True])
def test_undrawn_paths_do_not_move(single_rank, distributed):
    result = undrawn_invariance(distributed, "fp32", "gla")
    assert result["wrong"] == []
    assert result["steps"] == {"0": 2.0, "1": 2.0, "2": 2.0, "3": 0.0}


def test_undrawn_paths_do_not_move_in_bf16_with_sharded_state(pool):
    """Gated DeltaNet: an fp32 parameter stands among the bf16 ones."""
    ranks = pool.run(undrawn_invariance, True, "bf16", "gated_delta_net", world_size=2)
    # Each rank holds a part of the state, and a weight may lie in the other rank's part: it moves there all the same.
    assert [rank["wrong"] for rank in ranks] == [[], []]
    together = ranks[0]["steps"] | ranks[1]["steps"]
    assert together == {"0": 2.0, "1": 2.0, "2": 2.0, "3": 0.0}


def test_schedules():
    cosine = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    assert [learning_rate(cosine, s, 20) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(cosine, 4, 20) == 1.0
    assert learning_rate(cosine, 12, 20) == pytest.approx(0.55)
    assert learning_rate(cosine, 20, 20) == pytest.approx(0.1)
    wsd = cosine.replace(schedule="wsd", decay_fraction=0.25)
    assert learning_rate(wsd, 15, 20) == 1.0
    assert learning_rate(wsd, 17, 20) == pytest.approx(0.1 + 0.9 * 3 / 5)
    assert learning_rate(wsd, 20, 20) == pytest.approx(0.1)
    assert {learning_rate(cosine.replace(schedule="constant"), s, 20) for s in range(4, 21)} == {1.0}
    assert learning_rate(OptimizerConfig(lr=1.0), 0, 1) == 1.0


def test_draws_depend_on_seed_and_step_alone_and_follow_the_weights():
    sampling = PathSampling((("attn", "gla"),) * 6 + (("gla",), ("attn",)), {0: 1.0, 2: 3.0}, seed=3)
    plans = [sampling.draw(step) for step in range(2000)]
    assert plans[77] == sampling.draw(77)
    assert plans != [PathSampling(sampling.choices, sampling.full_layers, seed=4).draw(step) for step in range(2000)]
    assert all(plan[6:] == ("gla", "attn") for plan in plans)
    counts = [plan[:6].count("attn") for plan in plans]
    assert set(counts) == {0, 2}
    # binomial: 2000 * 0.75 with a standard deviation of 19.4; four of them either way
    assert abs(counts.count(2) - 1500) < 4 * math.sqrt(2000 * 0.75 * 0.25)
    per_layer = [sum(plan[i] == "attn" for plan in plans) for i in range(6)]
    assert max(per_layer) - min(per_layer) < 150  # 500 each, standard deviation about 20
    assert sampling.all_linear() == ("gla",) * 7 + ("attn",)


def test_more_full_layers_than_there_are_is_an_error():
    with pytest.raises(UserError, match="3 full layers asked for, but 2"):
        PathSampling((("attn", "gla"),) * 2, {3: 1.0}, seed=0)
