"""Full tensors both ways: bit-exact, Megatron's order of heads, and errors that name the tensor."""

import pytest
import torch

from megatron_jet.configs.errors import UserError
from megatron_jet.convert.weights import hf_to_megatron, megatron_to_hf
from megatron_jet.model.param_table import param_table
from mixers.mixer_cases import model_with, model_with_every_mixer


def hf_tensors(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for row in param_table(model)
        for name, shape in zip(row.hf, row.shapes, strict=True)
    }


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_round_trip_is_bit_exact(untied, qk_norm):
    model = model_with_every_mixer().replace(tie_word_embeddings=not untied, qk_norm=qk_norm)
    tensors = hf_tensors(model)
    back = megatron_to_hf(model, hf_to_megatron(model, tensors))
    assert set(back) == set(tensors) and ("lm_head.weight" in tensors) == untied
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_keys_and_names_are_used_once():
    rows = param_table(model_with_every_mixer())
    keys, names = [row.key for row in rows], [name for row in rows for name in row.hf]
    assert len(keys) == len(set(keys)) and len(names) == len(set(names))


def test_qkv_is_ordered_by_key_value_group():
    """Per group: its queries, its key, its value. Here 4 query heads in 2 groups, every head filled with its number."""
    model = model_with("attn")
    tensors = hf_tensors(model)
    prefix = "model.layers.0.self_attn."
    for name, heads, start in (("q", 4, 0), ("k", 2, 10), ("v", 2, 20)):
        numbers = torch.arange(start, start + heads).repeat_interleave(model.head_dim)
        tensors[f"{prefix}{name}_proj.bias"] = numbers.float()
        tensors[f"{prefix}{name}_proj.weight"] = numbers[:, None].expand(-1, model.hidden_size).float()
    mixed = hf_to_megatron(model, tensors)
    order = [0, 1, 10, 20, 2, 3, 11, 21]
    bias = mixed["decoder.layers.0.self_attention.linear_qkv.bias"]
    assert bias[:: model.head_dim].tolist() == order
    assert torch.equal(mixed["decoder.layers.0.self_attention.linear_qkv.weight"][:, 3], bias)


def test_missing_extra_and_misshaped_tensors_are_named():
    model = model_with("jet")
    tensors = hf_tensors(model)
    name = "model.layers.0.self_attn.dynamic_conv1d.kernel_generator.w2.bias"
    with pytest.raises(UserError, match=f"tensor '{name}' is missing"):
        hf_to_megatron(model, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(UserError, match="tensor 'model.layers.7.x' and 1 more is not part of the model"):
        hf_to_megatron(model, tensors | {"model.layers.7.x": tensors[name], "other": tensors[name]})
    with pytest.raises(UserError, match=r"w2.bias' has shape \[3\], the model needs \[108\]"):
        hf_to_megatron(model, tensors | {name: torch.zeros(3)})
    state = hf_to_megatron(model, tensors)
    with pytest.raises(UserError, match="checkpoint has no tensor 'decoder.final_layernorm.weight'"):
        megatron_to_hf(model, {key: value for key, value in state.items() if "final" not in key})
    with pytest.raises(UserError, match="checkpoint tensor 'decoder.final_layernorm.weight' has shape"):
        megatron_to_hf(model, state | {"decoder.final_layernorm.weight": torch.zeros(5)})


def test_a_tied_head_may_be_stored():
    model = model_with("attn")
    tensors = hf_tensors(model)
    assert "output_layer.weight" not in hf_to_megatron(
        model, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    )
