"""Initialisation, saving and loading, gradient checkpointing, attention implementations and kernel choice."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from safetensors.torch import load_file, save_file

from convert.hf_cases import JET, config_dict, random_model, random_tokens
from megatron_jet.convert.hf import recurrence
from megatron_jet.convert.hf.cache import HybridCache
from megatron_jet.convert.hf.configuration_megatron_jet import JetNemotronConfig, MegatronJetConfig
from megatron_jet.convert.hf.modeling_megatron_jet import JetNemotronForCausalLM, MegatronJetForCausalLM
from megatron_jet.convert.hf.token_layout import TokenLayout


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def test_initial_values():
    """FACTS of the published block: generator at zero with a drawn bias, A ~ U(0, 16), dt in [1e-3, 1e-1]."""
    jet = {**JET, "num_heads": 400, "head_dim": 2, "expand_v": 1, "dconv_generator_reduction": 8}
    config = config_dict(hidden_size=32, layer_types=["jet", "attn"], efficient_attention_config={"jet": jet})
    torch.manual_seed(0)
    model = MegatronJetForCausalLM(MegatronJetConfig(**config))
    block, attention = (layer.self_attn for layer in model.model.layers)
    generator = block.dynamic_conv1d.kernel_generator
    assert generator.w1.weight.count_nonzero() == generator.w2.weight.count_nonzero() == 0
    # 3200 draws: the standard error of the deviation is 0.02 / sqrt(6400).
    assert abs(generator.w2.bias.std() - 0.02) < 4 * 0.02 / math.sqrt(2 * generator.w2.bias.numel())
    a = block.A_log.exp()
    assert a.min() > 0 and a.max() <= 16
    assert abs(a.mean() - 8) < 4 * 16 / math.sqrt(12 * 400)
    dt = F.softplus(block.dt_bias)
    assert dt.min() > 1e-3 * 0.99 and dt.max() < 1e-1 * 1.01
    assert abs(dt.log().mean() - math.log(1e-2)) < 4 * math.log(100) / math.sqrt(12 * 400)
    assert abs(block.v_proj.weight.std() - 0.02) < 0.001
    assert attention.q_proj.bias.count_nonzero() == 0 and attention.q_proj.weight.std() > 0.01
    assert (block.o_norm.weight == 1).all() and (model.model.norm.weight == 1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, tied):
    model = random_model(config_dict(tie_word_embeddings=tied), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) is not tied
    again = MegatronJetForCausalLM.from_pretrained(tmp_path).eval()
    for (name, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(before, after), name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    assert torch.equal(logits(model, random_tokens(1, 9)), logits(again, random_tokens(1, 9)))


def test_loading_draws_only_what_is_missing(tmp_path):
    """A checkpoint without the generator starts it as a fresh one, and leaves what it has as it is."""
    model = random_model(config_dict(layer_types=["jet"]), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    # Copies: what older safetensors give is the file itself, which is written anew below.
    weights = {name: x.clone() for name, x in load_file(tmp_path / "model.safetensors").items()}
    prefix = "model.layers.0.self_attn."
    kept = {name: x for name, x in weights.items() if "w2.weight" not in name and not name.endswith("dt_bias")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = MegatronJetForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, x in kept.items():
        assert torch.equal(loaded[name], x), name
    assert loaded[prefix + "dynamic_conv1d.kernel_generator.w2.weight"].count_nonzero() == 0
    assert loaded[prefix + "dt_bias"].isfinite().all()


def test_decay_parameters_stay_fp32_in_a_bf16_model(tmp_path):
    model = random_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    half = MegatronJetForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, parameter in half.named_parameters():
        expected = torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16
        assert parameter.dtype == expected, name
    tokens = random_tokens(2, 40)
    cache = HybridCache(half.config)
    with torch.no_grad():
        parts = [half(part, past_key_values=cache).logits for part in tokens.split(13, 1)]
    whole = logits(half, tokens)
    # bf16 keeps 8 bits; rounding adds up over five layers to a few per cent of the logits' spread.
    assert (torch.cat(parts, 1) - whole).float().norm() < 0.05 * whole.float().norm()
    assert (whole.float() - logits(model, tokens)).norm() < 0.1 * whole.float().norm()
    assert cache.layers[0].tensors()["recurrent"].dtype == torch.float32


def test_no_layer_looks_like_one_that_adapters_wrap_without_effect():
    """A LoRA on an nn.Conv1d adds to what its forward gives; a convolution that carries a state goes another way."""
    model = random_model()
    assert not any(isinstance(module, torch.nn.Conv1d) for module in model.modules())
    before = logits(model, random_tokens(1, 9))
    model.model.layers[2].self_attn.q_conv1d.register_forward_hook(
        lambda module, inputs, output: (output[0] * 2, output[1])
    )
    assert not torch.equal(logits(model, random_tokens(1, 9)), before), "its forward is what the model computes"
    fresh = MegatronJetForCausalLM(MegatronJetConfig(**config_dict(initializer_range=0.3)))
    assert 0.15 < fresh.model.layers[2].self_attn.v_conv1d.weight.std() < 0.6


def test_gradient_checkpointing_changes_no_gradient():
    model, tokens = random_model(), random_tokens(2, 20)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(tokens, labels=tokens, use_cache=None if not checkpointing else True)
        assert out.past_key_values is None
        out.loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_gradient_checkpointing_reruns_the_layers(monkeypatch):
    model, calls = random_model().train(), []
    intact = type(model.model.layers[0].mlp).forward
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda mlp, x: calls.append(1) or intact(mlp, x))
    model.gradient_checkpointing_enable()
    tokens = random_tokens(1, 6)
    model(tokens, labels=tokens).loss.backward()
    assert len(calls) == 2 * len(model.model.layers)


def fake_flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    """flash_attn_func as its documentation says: [B, T, H, D], last query aligned with last key, inclusive window."""
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    i = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)[None]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if window_size[0] >= 0:
        visible &= j >= i - window_size[0]
    if causal:
        visible &= j <= i
    elif window_size[1] >= 0:
        visible &= j <= i + window_size[1]
    return F.scaled_dot_product_attention(q, k, v, visible, scale=softmax_scale).transpose(1, 2)


def fake_flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    q_parts, k_parts, v_parts = (
        x.split(bounds.diff().tolist()) for x, bounds in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
    )
    assert max(len(part) for part in q_parts) == max_seqlen_q and max(len(part) for part in k_parts) == max_seqlen_k
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
    return torch.cat(
        [fake_flash_attn_func(*(x[None] for x in xs), **options)[0] for xs in zip(q_parts, k_parts, v_parts)]
    )


@pytest.fixture
def flash_attention(monkeypatch):
    """transformers' own flash attention path on top of functions that do what flash_attn documents."""
    functions = (fake_flash_attn_func, fake_flash_attn_varlen_func, None, None, None)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    yield
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_attention_implementations_agree(implementation, flash_attention):
    """Dense, padded, packed, chunked and single-token passes; windows shorter and longer than the text."""
    config = config_dict(layer_types=["swa", "attn", "jet", "swa"], windows=[5, None, None, 400])
    sdpa, other = random_model(config), random_model(config)
    other.config._attn_implementation = implementation
    tokens = random_tokens(3, 300)
    mask = torch.ones(3, 300, dtype=torch.long)
    mask[0, :11], mask[1, 289:], mask[2, ::3] = 0, 0, 0
    packed = torch.cat([torch.arange(100), torch.arange(7), torch.arange(193)])[None]
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": packed}):
        for chunks in ([300], [299, 1], [1, 60, 1, 1, 150, 87]):
            caches, end = (HybridCache(sdpa.config), HybridCache(sdpa.config)), 0
            for part in chunks:
                here = slice(end, end + part)
                end += part
                now = dict(inputs)
                if "attention_mask" in now:
                    now["attention_mask"] = mask[:, :end]
                if "position_ids" in now:
                    now["position_ids"] = packed[:, here]
                a, b = (logits(m, tokens[:, here], past_key_values=c, **now) for m, c in zip((sdpa, other), caches))
                real = mask[:, here].bool() if "attention_mask" in now else torch.ones(3, part, dtype=torch.bool)
                assert (a - b)[real].abs().max() < 1e-10 * a.abs().max(), (list(now), chunks, end)


def test_kernel_choice(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(recurrence.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("JET_HF_KERNELS", raising=False)
    assert recurrence.use_fla(cuda) and not recurrence.use_fla(cpu)
    monkeypatch.setenv("JET_HF_KERNELS", "reference")
    assert not recurrence.use_fla(cuda)
    monkeypatch.setenv("JET_HF_KERNELS", "fla")
    assert recurrence.use_fla(cpu)
    monkeypatch.setattr(recurrence.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install flash-linear-attention"):
        recurrence.use_fla(cuda)
    monkeypatch.setenv("JET_HF_KERNELS", "fast")
    with pytest.raises(ValueError, match="choose auto, reference or fla"):
        recurrence.use_fla(cpu)


def test_kernels_get_the_reference_arguments(monkeypatch):
    """fla's functions, replaced by our references under fla's names and keywords, give the same logits."""
    from megatron_jet.convert.hf import gated_delta_rule, gla_recurrence

    class FakeFla:
        chunk_gated_delta_rule = staticmethod(gated_delta_rule.chunk_gated_delta_rule)
        fused_recurrent_gated_delta_rule = staticmethod(gated_delta_rule.recurrent_gated_delta_rule)
        fused_recurrent_gla = staticmethod(gla_recurrence.recurrent_gla)

        @staticmethod
        def chunk_gla(q, k, v, g, **options):
            return gla_recurrence.chunk_gla(q, k, v, g, **options)

    model, tokens = random_model(), random_tokens(2, 40)
    mask = (tokens > 4).long()
    expected = logits(model, tokens, attention_mask=mask)
    calls = []
    monkeypatch.setattr(recurrence, "use_fla", lambda device: True)
    monkeypatch.setattr(recurrence.importlib, "import_module", lambda name: calls.append(name) or FakeFla)
    assert (logits(model, tokens, attention_mask=mask) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert calls == ["fla.ops.gated_delta_rule", "fla.ops.gated_delta_rule", "fla.ops.gla"]


def test_published_and_superset_classes_compute_the_same():
    config = config_dict(layer_types=["jet", "swa", "attn"])
    superset = random_model(config)
    published = {key: value for key, value in config.items() if key != "head_dim"}
    model = JetNemotronForCausalLM(JetNemotronConfig(**published)).double().eval()
    model.load_state_dict(superset.state_dict())
    assert torch.equal(logits(model, random_tokens(1, 9)), logits(superset, random_tokens(1, 9)))


def test_loss_and_kept_logits():
    model, tokens = random_model(), random_tokens(2, 12)
    labels = tokens.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        out = model(tokens, labels=labels)
        last = model(tokens, logits_to_keep=1).logits
        as_tuple = model(tokens, labels=labels, return_dict=False)
        embedded = model(inputs_embeds=model.model.embed_tokens(tokens)).logits
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert abs(out.loss - expected) < 1e-6
    assert last.shape == (2, 1, 29) and (last - out.logits[:, -1:]).abs().max() < 1e-12
    assert torch.equal(embedded, out.logits)
    assert torch.equal(as_tuple[0], out.loss)
    with pytest.raises(ValueError, match="attention weights"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_layers_on_another_device_get_the_layout_there():
    """The meta device stands in for a second GPU: it refuses to be mixed with tensors of a CPU."""
    model = random_model(config_dict(layer_types=["attn", "attn", "swa"]))
    for module in (model.model.layers[1], model.model.layers[2], model.model.norm, model.lm_head):
        module.to("meta")

    def move(module, args):  # as accelerate's hooks do: tensors, alone or in tuples
        hidden, layout, rotary, cache = args
        return hidden.to("meta"), layout, tuple(x.to("meta") for x in rotary), cache

    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(move)
    tokens, mask = random_tokens(2, 6), torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        assert model(tokens, attention_mask=mask, use_cache=False).logits.device.type == "meta"
    layout = TokenLayout.build((2, 6), torch.device("cpu"), mask)
    meta = torch.device("meta")
    moved = layout.on(meta)
    assert {x.device for x in (moved.valid, moved.positions, moved.visible(moved.key_counts(), 3))} == {meta}
    assert layout.on(meta) is moved and layout.on(torch.device("cpu")) is layout
