"""Teacher families against transformers' own models: logits and gradients at every layout, and files both ways."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from convert.convert_cases import set_config
from layout_runs import next_token_loss, relative_error, train_step
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.hf_format import model_from_hf, model_to_hf
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.convert.hf.configuration_megatron_jet import JetNemotronConfig
from megatron_jet.convert.hf_export import export_hf
from megatron_jet.convert.hf_import import import_hf
from megatron_jet.convert.hf_package import load_for_causal_lm
from megatron_jet.convert.weights import megatron_to_hf
from megatron_jet.model.builder import build_model
from megatron_jet.training.checkpoint import save_model

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Wavelengths of these heads reach from 6 to hundreds of tokens: some stay, some are stretched, some lie between.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12, "rms_norm_eps": 1e-5}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 12, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
}
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2_sp": ParallelConfig(tensor=2, sequence_parallel=True),
}
JET = {"num_heads": 4, "head_dim": 6, "expand_v": 1.5, "conv_size": 3, "dconv_generator_reduction": 4}
# Two implementations in fp32; gradients carry the rounding of the whole backward pass (see tests/model).
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 5e-4


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(2))


def random_hf(family: str, tied: bool):
    """transformers' own model with random weights, all of which matter."""
    model_class, config_class, changes = FAMILIES[family]
    model = model_class(config_class(**SHAPE, tie_word_embeddings=tied, **changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_computes_what_transformers_computes(pool, tmp_path, family, tied):
    hf = random_hf(family, tied)
    hf.save_pretrained(tmp_path / "hf")
    model = import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert model.base_model_type == family
    expected = hf(tokens()).logits
    scale = expected.abs().max().item()
    next_token_loss(expected, tokens()).backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for name, layout in LAYOUTS.items():
        args = (model, layout, tokens())
        step = pool.run(train_step, *args, load_from=str(tmp_path / "checkpoint"), layout=layout)[0]
        torch.testing.assert_close(step.logits, expected, atol=LOGIT_TOLERANCE * scale, rtol=0)
        found = megatron_to_hf(model, step.grads)
        assert set(found) == set(gradients)
        for key, gradient in gradients.items():
            # K biases only shift all scores of a query, so that their gradient is nothing but rounding.
            rounding = (found[key] - gradient).norm() < 1e-6 * largest
            assert rounding or relative_error(found[key], gradient) < GRADIENT_TOLERANCE, (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("llama", False)])
def test_files_come_back_bit_for_bit(tmp_path, family, tied, dtype):
    """In shards with an index, by way of a checkpoint: every tensor's bytes, and config.json's."""
    random_hf(family, tied).to(dtype).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", shard_bytes=20_000)
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    before, after = all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_written_without_the_original_is_read_by_transformers(family):
    """A config of ours gives transformers the traits that the weights were trained with, and us the same model."""
    _, config_class, _ = FAMILIES[family]
    original = random_hf(family, True).config
    model = model_from_hf(json.loads(original.to_json_string(use_diff=False)))
    written = model_to_hf(model)
    assert model_from_hf(written) == model
    read = config_class(**{key: value for key, value in written.items() if key != "model_type"})
    for trait in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert getattr(read, trait) == getattr(original, trait), trait
    assert getattr(read, "head_dim", None) == getattr(original, "head_dim", None)
    for key, value in original.rope_parameters.items():
        assert read.rope_parameters[key] == value


def test_scaling_matters_and_is_llama_3s():
    """Without it the same weights give other logits, so the comparisons above would notice."""
    hf = random_hf("llama", True)
    expected = hf(tokens()).logits
    plain = LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=12, rope_parameters={"rope_theta": 500.0}))
    plain.load_state_dict(hf.state_dict())
    assert (plain(tokens()).logits - expected).abs().max() > 100 * LOGIT_TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_hybrid_code_computes_the_familys_softmax_layers(tmp_path, family):
    """Windows as long as the text make a plain model a hybrid in name only: the shipped code against transformers'."""
    hf = random_hf(family, False)
    hf.save_pretrained(tmp_path / "hf")
    plain = import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    hybrid = plain.with_plan(("swa:40", "swa:41"))
    set_config(tmp_path / "checkpoint", hybrid.to_dict())
    export_hf(tmp_path / "checkpoint", tmp_path / "export")
    exported = load_for_causal_lm(tmp_path / "export")
    assert exported.config.model_type == "megatron_jet"
    expected = hf(tokens()).logits
    scale = expected.abs().max().item()
    torch.testing.assert_close(exported(tokens()).logits, expected, atol=LOGIT_TOLERANCE * scale, rtol=0)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_hybrid_of_the_family_survives_export(single_rank, tmp_path, family):
    """Megatron's hybrid and its export agree, also at decoding, and the export can be imported again."""
    model = hybrid_of(family)
    chunk = build_model(model, single_rank)[0]
    save_model([chunk], tmp_path / "checkpoint", model_config=model.to_dict())
    export_hf(tmp_path / "checkpoint", tmp_path / "export")
    exported = load_for_causal_lm(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("megatron_jet", family)
    with torch.no_grad():
        logits, expected = chunk(tokens(), None, None), exported(tokens()).logits
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE * scale, rtol=0)
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = exported.generate(tokens()[:, :20], **greedy)
    assert torch.equal(cached, exported.generate(tokens()[:, :20], use_cache=False, **greedy))
    assert import_hf(tmp_path / "export", tmp_path / "again") == model


def hybrid_of(family: str) -> ModelConfig:
    plain = model_from_hf(json.loads(random_hf(family, True).config.to_json_string(use_diff=False)))
    return plain.replace(
        num_layers=4, layer_plan=("jet", "attn", "swa:5", "jet"), mixers={"jet": JET}, initializer_range=0.1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True is not understood for model_type 'llama'"),
        ({"mlp_bias": True}, "mlp_bias=True is not understood for model_type 'llama'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not understood for model_type 'llama'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor: Field required"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0 must be above"),
    ],
)
def test_what_a_family_cannot_have_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        model_from_hf({"model_type": "llama", **SHAPE, **changes})


def test_a_published_hybrid_with_scaling_is_the_same_to_both_readers():
    """Its rotary code takes any type that transformers knew; we compute Llama 3's and refuse the rest."""
    config = {**SHAPE, "layer_types": ["attn", "attn"], "model_type": "jet_nemotron", "rope_scaling": LLAMA3}
    model = model_from_hf(config)
    assert model.rope_scaling.factor == JetNemotronConfig(**config).rope_scaling["factor"] == LLAMA3["factor"]
    yarn = {**config, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(Exception, match="not supported"):
        JetNemotronConfig(**yarn)
    with pytest.raises(UserError, match="not supported"):
        model_from_hf(yarn)


def test_head_dim_of_qwen3_without_the_key():
    """transformers then takes 128 for Qwen3, and hidden_size / num_attention_heads for Llama."""
    assert model_from_hf({"model_type": "qwen3", **SHAPE}).head_dim == Qwen3Config(**SHAPE).head_dim == 128
    assert model_from_hf({"model_type": "llama", **SHAPE}).head_dim == LlamaConfig(**SHAPE).head_dim == 8
