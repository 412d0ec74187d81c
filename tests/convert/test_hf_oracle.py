"""A checkpoint in the published format gives the published numbers; and a JetBlock broken anywhere does not.

Tolerances: the oracle's own fp32 run differs from its fp64 run by 3.3e-5 in the logits, and two
independent fp32 implementations by 5.4e-5; 2e-4 leaves a factor of four.
"""

import pytest
import torch
import torch.nn.functional as F

from convert.hf_cases import load_oracle
from megatron_jet.convert.hf import delta_rule_mixer, jet_block, linear_mixer
from megatron_jet.convert.hf.jet_block import DynamicConv1d, JetBlock

ACTIVATIONS = 2e-4
GRADIENTS = 2e-4


@pytest.fixture(scope="module")
def oracle():
    return load_oracle()


def logits_error(model, expected) -> float:
    with torch.no_grad():
        return (model(expected["input_ids"]).logits - expected["logits"]).abs().max().item()


def test_logits_hidden_states_and_loss(oracle):
    model, expected, _ = oracle
    with torch.no_grad():
        out = model(expected["input_ids"], labels=expected["input_ids"], output_hidden_states=True)
    assert (out.logits - expected["logits"]).abs().max() < ACTIVATIONS
    assert len(out.hidden_states) == 5
    for i, hidden in enumerate(out.hidden_states):
        assert (hidden - expected[f"hidden_states.{i}"]).abs().max() < ACTIVATIONS, f"hidden_states.{i}"
    assert abs(out.loss - expected["loss"]) < 1e-5


def test_gradients(oracle):
    model, expected, gradients = oracle
    model.zero_grad()
    model(expected["input_ids"], labels=expected["input_ids"]).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() < GRADIENTS * gradient.norm(), name


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_is_token_for_token_the_published_one(oracle, use_cache):
    model, expected, _ = oracle
    out = model.generate(
        expected["generate_prompt"],
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=use_cache,
    )
    assert torch.equal(out, expected["generate_output"])


def broken_queries(self, x, *rest):
    _, k, v, after = JetBlock.intact_qkv(self, x, *rest)
    return self.q_proj(x), k, v, after


def broken_keys(self, x, *rest):
    q, _, v, after = JetBlock.intact_qkv(self, x, *rest)
    return q, self.k_proj(x), v, after


def reversed_taps(v, kernel, **options):
    return jet_block.intact_conv(v, kernel.flip(-1), **options)


def shifted_conv(v, kernel, **options):
    out, state = jet_block.intact_conv(v, kernel, **options)
    return F.pad(out, (0, 0, 1, 0))[:, :-1], state


def tap_major_kernel(v, kernel, **options):
    channels, width = kernel.shape[-2:]
    return jet_block.intact_conv(v, kernel.flatten(-2).unflatten(-1, (width, channels)).mT, **options)


def conv_without_silu(v, kernel, **options):
    return jet_block.intact_conv(v, kernel, **{**options, "activation": None})


def rule_with(**changes):
    def broken(q, k, v, g, beta, **options):
        inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
        inputs.update({name: change(inputs) for name, change in changes.items()})
        return delta_rule_mixer.intact_rule(*inputs.values(), **options)

    return broken


def norm_with_other_eps(o, weight, gate, eps):
    return linear_mixer.intact_norm(o, weight, gate, 1e-6)


def gate_without_silu(o, weight, gate, eps):
    return F.rms_norm(o, o.shape[-1:], weight, eps) * gate


def gate_before_norm(o, weight, gate, eps):
    return F.rms_norm(o * F.silu(gate), o.shape[-1:], weight, eps)


MUTANTS = {
    "q without SiLU": (JetBlock, "qkv", broken_queries),
    "k without SiLU": (JetBlock, "qkv", broken_keys),
    "v without SiLU": (jet_block, "dynamic_causal_conv", conv_without_silu),
    "taps in reverse order": (jet_block, "dynamic_causal_conv", reversed_taps),
    "taps before channels": (jet_block, "dynamic_causal_conv", tap_major_kernel),
    "convolution late by one token": (jet_block, "dynamic_causal_conv", shifted_conv),
    "generator without SiLU": (jet_block.KernelGenerator, "forward", lambda self, x: self.w2(self.w1(x))),
    "q and k not normalised": (delta_rule_mixer, "l2_normalize", lambda x: x),
    "scale missing": (delta_rule_mixer, "gated_delta_rule", rule_with(q=lambda i: i["q"] * 24**0.5)),
    "beta without sigmoid": (delta_rule_mixer, "gated_delta_rule", rule_with(beta=lambda i: i["beta"].logit())),
    "decay of the wrong sign": (delta_rule_mixer, "gated_delta_rule", rule_with(g=lambda i: -i["g"] * 0.01)),
    "no decay": (delta_rule_mixer, "gated_delta_rule", rule_with(g=lambda i: i["g"] * 0)),
    "q and k exchanged": (delta_rule_mixer, "gated_delta_rule", rule_with(q=lambda i: i["k"], k=lambda i: i["q"])),
    "dt_bias ignored": (
        delta_rule_mixer.DeltaRuleMixer,
        "log_decay",
        lambda self, x: -self.A_log.exp() * F.softplus(self.a_proj(x)),
    ),
    "A_log not exponentiated": (
        delta_rule_mixer.DeltaRuleMixer,
        "log_decay",
        lambda self, x: -self.A_log.abs() * F.softplus(self.a_proj(x) + self.dt_bias),
    ),
    "gate without SiLU": (linear_mixer, "rms_norm_gated", gate_without_silu),
    "gate before the norm": (linear_mixer, "rms_norm_gated", gate_before_norm),
    "eps of the other norms": (linear_mixer, "rms_norm_gated", norm_with_other_eps),
}


@pytest.mark.parametrize("breakage", MUTANTS)
def test_a_broken_jet_block_fails_exactness(oracle, monkeypatch, breakage):
    model, expected, _ = oracle
    monkeypatch.setattr(JetBlock, "intact_qkv", JetBlock.qkv, raising=False)
    monkeypatch.setattr(jet_block, "intact_conv", jet_block.dynamic_causal_conv, raising=False)
    monkeypatch.setattr(delta_rule_mixer, "intact_rule", delta_rule_mixer.gated_delta_rule, raising=False)
    monkeypatch.setattr(linear_mixer, "intact_norm", linear_mixer.rms_norm_gated, raising=False)
    assert logits_error(model, expected) < ACTIVATIONS
    monkeypatch.setattr(*MUTANTS[breakage])
    error = logits_error(model, expected)
    assert not error < ACTIVATIONS  # "not <" also counts a NaN as broken


def test_a_leaking_conv_state_fails_the_decode(oracle, monkeypatch):
    """The published cache was wrong after chunks shorter than the kernel; such a state must not go unnoticed."""
    model, expected, _ = oracle
    intact = DynamicConv1d.forward

    def stale(self, v, x, state, cu_seqlens, keep_state):
        out, after = intact(self, v, x, state, cu_seqlens, keep_state)
        return out, after if state is None or after is None else state

    monkeypatch.setattr(DynamicConv1d, "forward", stale)
    out = model.generate(
        expected["generate_prompt"], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert not torch.equal(out, expected["generate_output"])
