"""The published model's numbers, through Megatron at every layout.

tests/data/jet_tiny holds a checkpoint in the published format with logits, hidden states, loss and gradients that the
published code computed. The bounds are fp32 rounding on logits with a spread of 2.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from jet_kernels import dispatch
from layout_runs import relative_error, train_step
from megatron_jet.configs.files import read_json
from megatron_jet.configs.hf_format import model_from_hf
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.convert.weights import hf_to_megatron, megatron_to_hf
from megatron_jet.mixers import jet_block
from megatron_jet.mixers.jet_block import JetBlock
from megatron_jet.model.builder import build_model
from megatron_jet.model.state import load_tensors
from megatron_jet.model.stepwise import embed

ORACLE = Path(__file__).parent.parent / "data" / "jet_tiny"
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def oracle():
    """Model, its checkpoint tensors, what the published code computed, and its gradients."""
    model = model_from_hf(read_json(ORACLE / "config.json"))
    weights = hf_to_megatron(model, load_file(ORACLE / "model.safetensors"))
    return model, weights, load_file(ORACLE / "expected.safetensors"), load_file(ORACLE / "expected_grads.safetensors")


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_numbers(pool, oracle, name):
    model, weights, expected, grads = oracle
    layout = LAYOUTS[name]
    step = pool.run(train_step, model, layout, expected["input_ids"], tensors=weights, layout=layout)[0]
    assert (step.logits - expected["logits"]).abs().max() < 2e-4
    assert step.loss == pytest.approx(expected["loss"].item(), abs=1e-5)
    for layer in range(model.num_layers - 1):  # the published hidden_states.i is the input of layer i
        assert (step.hidden[layer] - expected[f"hidden_states.{layer + 1}"]).abs().max() < 2e-4
    assert (step.final_norm - expected["hidden_states.4"]).abs().max() < 2e-4
    found = megatron_to_hf(model, step.grads)
    assert {f"grad.{name}" for name in found} == set(grads)
    for tensor, grad in found.items():
        assert relative_error(grad, grads[f"grad.{tensor}"]) < 2e-4, tensor


def test_embedding_output(single_rank, oracle):
    model, weights, expected, _ = oracle
    chunks = build_model(model, single_rank, init_seed=None)
    load_tensors(chunks, weights)
    hidden = embed(chunks[0], expected["input_ids"]).transpose(0, 1)
    assert torch.equal(hidden, expected["hidden_states.0"])


def section(name, change):
    """Change one section of the input projection on its way into the block."""

    def wrap(mix):
        return lambda self, hidden, parts, *args: mix(self, hidden, parts | {name: change(parts[name])}, *args)

    return JetBlock, "mix", wrap


def parameter(name, change):
    """Run the block with one of its parameters changed."""

    def wrap(mix):
        def changed(self, *args):
            tensor = getattr(self, name)
            kept = tensor.data
            tensor.data = change(kept)
            try:
                return mix(self, *args)
            finally:
                tensor.data = kept

        return changed

    return JetBlock, "mix", wrap


def recurrence(**changes):
    """Change arguments of the recurrence."""

    def wrap(rule):
        def changed(q, k, v, g, beta, **options):
            given = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
            return rule(**(given | {name: change(given) for name, change in changes.items()}), **options)

        return changed

    return dispatch, "chunk_gated_delta_rule", wrap


def reverse_taps(bias):
    return bias.unflatten(0, (-1, 4)).flip(1).flatten()


MUTATIONS = {
    "no SiLU on queries and keys": (jet_block.F, "silu", lambda silu: lambda x: x if x.shape[-1] == 48 else silu(x)),
    "no L2 norm": (dispatch, "l2_normalize", lambda norm: lambda x: x),
    "no SiLU after the convolution": (
        dispatch,
        "fused_dynamic_conv",
        lambda conv: lambda *args, **options: conv(*args, **(options | {"activation": None})),
    ),
    "no SiLU on the gate": (
        dispatch,
        "rms_norm_gated",
        lambda norm: lambda o, weight, gate, eps: norm(o, weight, gate, eps) / gate.sigmoid(),
    ),
    "another eps": (
        dispatch,
        "rms_norm_gated",
        lambda norm: lambda o, weight, gate, eps: norm(o, weight, gate, 0.1),
    ),
    "no scale": recurrence(q=lambda a: a["q"] * 24**0.5),
    "decay of the wrong sign": recurrence(g=lambda a: -a["g"].clamp(min=-1)),
    "write strength without sigmoid": recurrence(beta=lambda a: a["beta"].logit()),
    "taps reversed": parameter("kernel_bias", reverse_taps),
    "kernel generator left out": parameter("kernel_w2", torch.zeros_like),
    "dt_bias left out": parameter("dt_bias", torch.zeros_like),
    "A instead of log A": parameter("A_log", torch.exp),
    "values one token late": section("value", lambda v: F.pad(v, (0, 0, 1, 0))[:, :-1]),
    "keys of another head": section("key", lambda k: k.roll(24, dims=-1)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_block_is_noticed(single_rank, oracle, monkeypatch, name):
    """Each single breakage moves the logits out of the bounds of `test_published_numbers`."""
    model, weights, expected, _ = oracle
    target, attribute, wrap = MUTATIONS[name]
    monkeypatch.setattr(target, attribute, wrap(getattr(target, attribute)))
    chunks = build_model(model, single_rank, init_seed=None)
    load_tensors(chunks, weights)
    with torch.no_grad():
        logits = chunks[0](expected["input_ids"], None, None)
    assert not (logits - expected["logits"]).abs().max() < 2e-4
