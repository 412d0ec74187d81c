"""fp32 parameters among bf16 ones: every state belongs to its parameter, in memory and in checkpoints.

Every parameter gets weights and a gradient that no other has, so its state tells whose it is.
"""

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import LossConfig, OptimizerConfig, ParallelConfig
from megatron_jet.training.checkpoint import load_model, save_model, save_sharded
from megatron_jet.training.distill import DistillationModel
from megatron_jet.training.freezing import freeze, named_parameters
from megatron_jet.training.optimizer import Optimizer, wrap_data_parallel
from megatron_jet.training.train_state import Progress, load_state, state_to_save
from mixers.mixer_cases import model_with, model_with_every_mixer
from training.training_cases import ONE, built

LR, BETA1 = 0.25, 0.9
MODELS = {
    "jet": model_with("jet", "attn"),
    "gated_delta_net": model_with("attn", "gated_delta_net"),
    "every mixer": model_with_every_mixer(),
}
TP2, PP2 = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
TIED = ("embedding.word_embeddings.weight", "output_layer.weight")  # one weight, at both ends of a pipeline


def numbered(student: list) -> dict[str, int]:
    """A number for every parameter that no other of this pipeline stage has."""
    return {name: 1 if name in TIED else i for i, (name, _) in enumerate(named_parameters(student), start=2)}


def optimised(model: ModelConfig, parallel: ParallelConfig, distributed: bool, fill: bool = False):
    """(model chunks, optimiser); `fill` makes every weight its parameter's number.

    On several data-parallel ranks, gradients are reduced in small buckets, with gaps between them.
    """
    student = built(model, parallel, dtype="bf16")
    freeze(student, ("*",))
    if fill:
        numbers = numbered(student)
        for name, parameter in named_parameters(student):
            parameter.data.fill_(numbers[name])
    wrapped = [DistillationModel(chunk, None, LossConfig(cross_entropy=1.0), model.num_layers) for chunk in student]
    overlap = parallel_state.get_data_parallel_world_size() > 1
    wrapped = wrap_data_parallel(wrapped, distributed_optimizer=distributed, overlap=overlap, bucket_size=500)
    config = OptimizerConfig(lr=LR, weight_decay=0.0, clip_grad=0.0, beta1=BETA1)
    return student, Optimizer(wrapped, config, dtype=torch.bfloat16, distributed=distributed, undrawn=True)


def is_undrawn(name: str) -> bool:
    """One of each kind: fp32, a bf16 vector, a matrix."""
    return name.endswith(("dt_bias", "o_norm.weight", "out_proj.weight")) or name == "decoder.layers.0.A_log"


def seen(student: list, optimizer: Optimizer) -> dict[str, dict[str, float]]:
    """Per parameter with a part of its state here: its one value in the model, its main copy and its moments."""
    found = {}
    for name, parameter in named_parameters(student):
        state = optimizer.state_of(parameter)
        if not state:
            continue
        main = optimizer._main_tensor[parameter]
        tensors = {"weight": parameter, "main": main, "moment": state["exp_avg"], "square": state["exp_avg_sq"]}
        for key, tensor in tensors.items():
            assert tensor.min() == tensor.max(), f"{name}: {key} is of several parameters"
        assert main.dtype == state["exp_avg"].dtype == torch.float32
        found[name] = {key: tensor.max().item() for key, tensor in tensors.items()} | {"step": float(state["step"])}
    return found


def saved(out: Path, parallel: ParallelConfig, distributed: bool) -> dict[str, dict]:
    """Worker: one step of every model with recognisable gradients, saved."""
    results = {}
    for case, model in MODELS.items():
        student, optimizer = optimised(model, parallel, distributed, fill=True)
        optimizer.zero_grad()
        named, numbers = list(named_parameters(student)), numbered(student)
        for name, parameter in named:
            parameter.main_grad.fill_(numbers[name])
        optimizer.gradient_norm()
        optimizer.apply(LR, [parameter for name, parameter in named if is_undrawn(name)])
        results[case] = seen(student, optimizer)
        results[case, "numbers"] = numbers
        save_model(student, out / case / "model")
        save_sharded(state_to_save(student, optimizer, Progress(step=1), None), out / case / "state")
    return results


def loaded(out: Path, parallel: ParallelConfig, distributed: bool) -> dict[str, dict]:
    """Worker: the same models anew, with what was saved."""
    results = {}
    for case, model in MODELS.items():
        student, optimizer = optimised(model, parallel, distributed)
        load_model(student, out / case / "model")
        load_state(student, optimizer, out / case / "state", saved_layout={})
        results[case] = seen(student, optimizer)
    return results


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "whole"])
@pytest.mark.parametrize(
    "first, second",
    [((ONE, 1), (ONE, 2)), ((ONE, 2), (ONE, 1)), ((TP2, 2), (TP2, 2)), ((PP2, 2), (PP2, 2))],
    ids=["dp1-dp2", "dp2-dp1", "tp2", "pp2"],
)
def test_every_parameter_has_its_own_state(pool, tmp_path, first, second, distributed):
    for folder in MODELS:
        (tmp_path / folder / "state").mkdir(parents=True)
    before = pool.run(saved, tmp_path, first[0], distributed, layout=first[0], world_size=first[1])
    after = pool.run(loaded, tmp_path, second[0], distributed, layout=second[0], world_size=second[1])
    for case in MODELS:
        together = together_of(before, case)
        numbers = {name: number for rank in before for name, number in rank[case, "numbers"].items()}
        assert together.keys() == numbers.keys()
        for name, values in together.items():
            drawn, number = not is_undrawn(name), numbers[name]
            assert values["moment"] == pytest.approx((1 - BETA1) * number * drawn), name
            assert values["main"] == pytest.approx(number - LR * drawn, abs=1e-5), name
            assert values["weight"] == pytest.approx(values["main"], rel=0 if "A_log" in name else 2**-8), name
            assert values["step"] == drawn, name
        assert together_of(after, case) == together


def together_of(ranks: list[dict], case: str) -> dict[str, dict]:
    """What the ranks hold between them; a parameter cut in two has the same values in both."""
    together: dict[str, dict] = {}
    for rank in ranks:
        for name, values in rank[case].items():
            assert together.setdefault(name, values) == values
    return together
