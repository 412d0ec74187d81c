"""A hybrid of full-attention layers only is Qwen2, and does what transformers' own model does."""

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from convert.hf_cases import JET, config_dict, random_model
from megatron_jet.convert.hf.cache import HybridCache
from megatron_jet.convert.hf.configuration_megatron_jet import JetNemotronConfig
from megatron_jet.convert.hf.modeling_megatron_jet import JetNemotronForCausalLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1e4,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOLERANCE = 1e-5  # transformers rotates and normalises in fp32 whatever the model's type: about 1e-7 per step
LENGTH, GAP = 23, slice(5, 9)


def pair(**changes) -> tuple[JetNemotronForCausalLM, Qwen2ForCausalLM]:
    """The hybrid and transformers' model with the same random weights, in fp64."""
    torch.manual_seed(0)
    settings = SHAPE | changes
    scaling = settings.pop("rope_scaling", {"rope_type": "default"})
    theta = settings.pop("rope_theta")
    qwen = Qwen2ForCausalLM(Qwen2Config(**settings, rope_parameters={"rope_theta": theta, **scaling})).double().eval()
    for name, parameter in qwen.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    hybrid = JetNemotronForCausalLM(JetNemotronConfig(**SHAPE | changes, layer_types=["attn", "attn"])).double().eval()
    hybrid.load_state_dict(qwen.state_dict())
    return hybrid, qwen


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(1, SHAPE["vocab_size"], (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def gap_mask(rows: int = 2) -> torch.Tensor:
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[0, GAP] = 0
    return mask


def assert_equal(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
@torch.no_grad()
def test_logits(scaling):
    hybrid, qwen = pair(**{} if scaling is None else {"rope_scaling": scaling})
    assert_equal(hybrid(tokens()).logits, qwen(tokens()).logits)


@torch.no_grad()
def test_padding_in_the_middle_with_column_positions_is_one_document():
    hybrid, qwen = pair()
    inputs = {"attention_mask": gap_mask(), "position_ids": torch.arange(LENGTH).expand(2, -1)}
    assert_equal(hybrid(tokens(), **inputs).logits, qwen(tokens(), **inputs).logits, gap_mask())


@pytest.mark.parametrize("chunks", [(7, 1, 15), (13, 1, 9), (3, 20)], ids=str)
@torch.no_grad()
def test_padding_in_the_middle_with_column_positions_in_chunks(chunks):
    hybrid, qwen = pair()
    caches, logits, start = (HybridCache(hybrid.config), DynamicCache(config=qwen.config)), ([], []), 0
    for length in chunks:
        end = start + length
        for model, cache, parts in zip((hybrid, qwen), caches, logits, strict=True):
            columns = torch.arange(start, end).expand(2, -1)
            mask = gap_mask()[:, :end]
            out = model(tokens()[:, start:end], attention_mask=mask, position_ids=columns, past_key_values=cache)
            parts.append(out.logits)
        start = end
    assert_equal(torch.cat(logits[0], 1), torch.cat(logits[1], 1), gap_mask())


@torch.no_grad()
def test_a_state_passes_over_padding_in_the_middle():
    """A JetBlock has no positions: with padding it is what it is without."""
    model = random_model(config_dict(layer_types=["jet", "jet"], efficient_attention_config={"jet": JET}))
    ids, mask = tokens(1) % 29, gap_mask(1)
    whole = model(ids, attention_mask=mask, position_ids=torch.arange(LENGTH)[None]).logits
    assert_equal(whole[mask.bool()], model(ids[mask.bool()][None]).logits[0])


@torch.no_grad()
def test_a_document_after_padding_sees_none_before_it():
    hybrid, _ = pair()
    mask = gap_mask(1)
    positions = torch.cat([torch.arange(GAP.stop), torch.arange(LENGTH - GAP.stop)])[None]
    whole = hybrid(tokens(1), attention_mask=mask, position_ids=positions).logits
    assert_equal(whole[:, GAP.stop :], hybrid(tokens(1)[:, GAP.stop :]).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_with_a_padding_token_in_the_input(tied):
    """transformers and the published code give the embedding's row of that token none; a tied head gives it its own."""
    hybrid, qwen = pair(pad_token_id=3, tie_word_embeddings=tied)
    ids = tokens().masked_fill(gap_mask() == 0, 3)
    for model in (hybrid, qwen):
        model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in qwen.named_parameters()}
    for name, parameter in hybrid.named_parameters():
        assert_equal(parameter.grad, expected[name])
    assert tied or not expected["model.embed_tokens.weight"][3].any()


def test_a_padding_token_without_a_row_is_no_row():
    config = JetNemotronConfig(**SHAPE, layer_types=["attn", "attn"], pad_token_id=SHAPE["vocab_size"])
    assert JetNemotronForCausalLM(config).model.embed_tokens.padding_idx is None


@pytest.mark.parametrize("scaling", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}])
def test_a_scaling_given_when_loading_is_applied_or_refused(scaling, tmp_path):
    hybrid, _ = pair()
    hybrid.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not supported, only default, llama3"):
        JetNemotronForCausalLM.from_pretrained(tmp_path, rope_scaling=scaling)
    loaded = JetNemotronForCausalLM.from_pretrained(tmp_path, rope_scaling=LLAMA3, dtype=torch.float64).eval()
    with torch.no_grad():
        assert_equal(loaded(tokens()).logits, pair(rope_scaling=LLAMA3)[1](tokens()).logits)
