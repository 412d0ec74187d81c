"""Where the weights start: the published rules, the teacher's heads, and JetBlock's static beginning."""

import pytest
import torch

from megatron_jet.configs.mixers.registry import LINEAR_MIXERS
from megatron_jet.mixers.params import AttentionWeights
from megatron_jet.mixers.registry import mixer_definition
from megatron_jet.model.builder import build_model
from megatron_jet.model.initialize import (
    attention_weights,
    layer_generator,
    mixer_from_scratch,
    mixer_from_teacher,
    mixer_state,
)
from megatron_jet.model.state import gather_tensors, load_tensors
from mixers.mixer_cases import MIXER_SETTINGS, model_with


def teacher_of(model) -> AttentionWeights:
    """A softmax layer whose every head has its own number: q 1.., k 11.., v 21.., o 31.."""
    hd, h = model.head_dim, model.hidden_size

    def numbered(start: int, heads: int) -> torch.Tensor:
        return torch.arange(start, start + heads).repeat_interleave(hd)[:, None].expand(-1, h).float()

    n, groups = model.num_attention_heads, model.num_key_value_heads
    return AttentionWeights(
        numbered(1, n), numbered(11, groups), numbered(21, groups), numbered(31, n).t(), n, groups, hd
    )


@pytest.mark.parametrize("kind", LINEAR_MIXERS)
@pytest.mark.parametrize(
    ("heads", "q", "kv"),
    [
        (4, [1, 2, 3, 4], [11, 11, 12, 12]),  # as many heads as the teacher: one to one, key/value heads repeated
        (2, [1, 3], [11, 12]),
        (8, [1, 1, 2, 2, 3, 3, 4, 4], [11] * 4 + [12] * 4),
        (1, [1], [11]),
    ],
)
def test_teacher_heads_are_copied(kind, heads, q, kv):
    """Matching slices hold the teacher's numbers; what the teacher does not have is drawn around zero."""
    settings = MIXER_SETTINGS | {kind: MIXER_SETTINGS[kind] | {"num_heads": heads, "head_dim": 12, "expand_v": 0.5}}
    model = model_with(kind, mixers=settings)
    tensors = mixer_from_teacher(model, kind, teacher_of(model), layer_generator(0, 0))
    # d_k = 12 rows: the teacher has 8 of them; d_v = 6 rows: the teacher has them all.
    for name, expected, width, known in (("q", q, 12, 8), ("k", kv, 12, 8), ("v", [n + 10 for n in kv], 6, 6)):
        rows = tensors[f"{name}_proj.weight"].view(heads, width, -1)
        assert rows[:, 0, 0].tolist() == expected
        assert (rows[:, :known] == rows[:, :1, :1]).all()
        assert (rows[:, known:].abs() < 1).all() and (known == width or rows[:, known:].std() > 0)
    columns = tensors["o_proj.weight"].view(-1, heads, 6)
    assert columns[0, :, 0].tolist() == [n + 30 for n in q]
    assert (columns == columns[:1, :, :1]).all()


def test_teacher_weights_come_out_of_a_checkpoint():
    model = model_with("attn", "attn")
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]
    weights = attention_weights(model, 1, {name: torch.full((2, 2), i) for i, name in enumerate(names)})
    assert [weights.q[0, 0], weights.k[0, 0], weights.v[0, 0], weights.o[0, 0]] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", LINEAR_MIXERS)
def test_rows_cover_what_is_drawn(kind):
    """Every tensor that a start gives has a row, with its shape, and the other way round."""
    model = model_with(kind)
    shapes = {
        name: shape
        for row in mixer_definition(kind).hf_rows(model.mixer(0), model)
        for name, shape in zip(row.hf, row.shapes, strict=True)
    }
    for tensors in (
        mixer_from_scratch(model, kind, layer_generator(0, 0)),
        mixer_from_teacher(model, kind, teacher_of(model), layer_generator(0, 0)),
    ):
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes


@pytest.mark.parametrize("kind", ["jet", "gated_delta_net"])
def test_decay_starts_as_published(kind):
    """A ~ U(0, 16); softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
    model = model_with(kind, mixers=MIXER_SETTINGS | {kind: MIXER_SETTINGS[kind] | {"num_heads": 4000, "head_dim": 4}})
    tensors = mixer_from_scratch(model, kind, layer_generator(0, 0))
    a, dt = tensors["A_log"].exp(), torch.nn.functional.softplus(tensors["dt_bias"])
    assert 0 < a.min() < 0.1 and 15.9 < a.max() <= 16 and abs(a.mean() - 8) < 0.3  # standard error 0.07
    assert dt.min() > 0.99e-3 and dt.max() < 1.01e-1
    assert abs(dt.log10().mean() + 2) < 0.05  # standard error 0.009


def test_jet_block_starts_static_and_can_learn(single_rank):
    """At the start all tokens have the same kernels, and the generator's second layer gets a gradient."""
    model = model_with("jet")
    chunk = build_model(model, single_rank)[0]
    tokens = torch.arange(30)[None]
    logits = chunk(tokens, None, None)
    mixer = chunk.decoder.layers[0].self_attention
    assert mixer.kernel_w2.abs().max() == 0 and mixer.kernel_w1.abs().max() > 0
    logits.logsumexp(-1).sum().backward()
    assert mixer.kernel_w2.grad.abs().max() > 0

    static = model_with("jet", mixers={"jet": MIXER_SETTINGS["jet"] | {"static_kernel": True}})
    other = build_model(static, single_rank)[0]
    load_tensors([other], gather_tensors([chunk]))
    torch.testing.assert_close(other(tokens, None, None), logits, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        other.decoder.layers[0].self_attention.kernel_w2.normal_()
    other_logits = other(tokens, None, None)
    torch.testing.assert_close(other_logits, logits, atol=1e-6, rtol=1e-5)  # the ablation never asks the generator
    other_logits.sum().backward()
    frozen = [name for name, parameter in other.named_parameters() if not parameter.requires_grad]
    assert [name.rpartition(".")[2] for name in frozen] == ["kernel_w1", "kernel_w2"]


def test_a_started_mixer_loads_into_a_model(single_rank):
    """`mixer_state` gives the checkpoint keys of one layer's mixer."""
    model = model_with("attn", "gla")
    chunks = build_model(model, single_rank)
    tensors = mixer_from_teacher(model, "gla", teacher_of(model), layer_generator(3, 1))
    prefix = "decoder.layers.1.self_attention."
    state = {f"{prefix}{key}": tensor for key, tensor in mixer_state(model, "gla", tensors).items()}
    load_tensors(chunks, state, strict=False)
    loaded = gather_tensors(chunks)
    assert {key for key in loaded if key.startswith(prefix)} == set(state)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_no_weight_decay_on_the_decay(single_rank):
    """A_log and dt_bias are marked, and are 1-D, which Megatron's optimiser exempts."""
    chunk = build_model(model_with("jet", "gated_delta_net"), single_rank)[0]
    marked = {name.rpartition(".")[2] for name, p in chunk.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "dt_bias"}
