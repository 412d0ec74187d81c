"""Caches and `generate`: chunked prefill, padding, beams, sampling, sizes.

fp64, so that two ways to the same logits differ by 1e-13 and greedy tokens cannot flip.
"""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

from convert.hf_cases import config_dict, random_model, random_tokens
from megatron_jet.convert.hf.cache import HybridCache, KeyValueLayer, SlidingWindowLayer
from megatron_jet.convert.hf.modeling_megatron_jet import CACHE_NAME

LENGTHS = (3, 17, 40, 70)


@pytest.fixture(scope="module")
def model():
    """Every mixer, a window of 5."""
    return random_model()


def greedy(model, tokens, mask=None, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(tokens, attention_mask=mask, **options)


def padded(prompts, side="left"):
    width = max(len(prompt) for prompt in prompts)
    tokens, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        here = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        tokens[row, here], mask[row, here] = prompt, 1
    return tokens, mask


@pytest.mark.parametrize("chunk", [1, 2, 3, 63, 64, 65, 130])
def test_chunked_prefill_equals_one_pass(model, chunk):
    tokens = random_tokens(2, 130)
    cache = HybridCache(model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(chunk, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10 * whole.abs().max()
    assert cache.get_seq_length() == 130


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 70}, {"use_cache": False}, {"num_beams": 3}])
def test_a_padded_batch_generates_what_each_prompt_does_alone(model, side, options):
    prompts = [random_tokens(length, seed=length) for length in LENGTHS]
    together = greedy(model, *padded(prompts, side), **options)
    for row, prompt in enumerate(prompts):
        alone = greedy(model, prompt[None], torch.ones(1, len(prompt), dtype=torch.long), **options)
        assert torch.equal(together[row, -12:], alone[0, -12:]), f"prompt of {len(prompt)} tokens"


def test_left_padded_prompts_in_short_chunks(model):
    """Whole chunks of the short rows are padding."""
    prompts = [random_tokens(length, seed=length) for length in LENGTHS]
    assert torch.equal(greedy(model, *padded(prompts), prefill_chunk_size=7), greedy(model, *padded(prompts)))


@pytest.mark.parametrize("chunk", range(1, 13))
def test_right_padded_prompts_in_chunks_of_any_length(model, chunk):
    """The last column goes on from each row's last real token, however many passes ago that was."""
    prompts = [random_tokens(length, seed=length) for length in (1, 4, 7, 12)]
    tokens, mask = padded(prompts, "right")
    cache, seen = HybridCache(model.config), 0
    with torch.no_grad():
        for part in tokens.split(chunk, 1):
            seen += part.shape[1]
            last = model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits[:, -1]
        for row, prompt in enumerate(prompts):
            alone = model(prompt[None], use_cache=False).logits[0, -1]
            assert (last[row] - alone).abs().max() < 1e-10 * alone.abs().max(), f"row {row}"
    together = greedy(model, tokens, mask, prefill_chunk_size=chunk)
    for row, prompt in enumerate(prompts):
        alone = greedy(model, prompt[None], torch.ones(1, len(prompt), dtype=torch.long))
        assert torch.equal(together[row, -12:], alone[0, -12:])


def test_the_last_real_token_follows_its_row_through_the_cache(model):
    """Rows of a cache that are reordered, picked, repeated: a pass of padding shows where each goes on from."""
    prompts = [random_tokens(length, seed=length) for length in (3, 9, 5)]
    with torch.no_grad():
        alone = torch.stack([model(prompt[None], use_cache=False).logits[0, -1] for prompt in prompts])
        for change, rows in [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        ]:
            tokens, mask = padded(prompts, "right")
            cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
            change(cache)
            nothing = torch.zeros(len(rows), 2, dtype=torch.long)
            logits = model(nothing, attention_mask=nothing, past_key_values=cache).logits
            assert (logits - alone[rows][:, None]).abs().max() < 1e-10 * alone.abs().max()


def test_right_padded_prompts_continue_as_if_alone(model):
    """Prefill with padding on the right, then feed each row its own next tokens."""
    prompts = [random_tokens(length, seed=length) for length in (5, 11)]
    tokens, mask = padded(prompts, "right")
    after = random_tokens(2, 8, seed=3)
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        for step in range(8):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            logits = model(after[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits[:, -1]
        for row, prompt in enumerate(prompts):
            alone = model(torch.cat([prompt, after[row]])[None]).logits[0, -1]
            assert (logits[row] - alone).abs().max() < 1e-10 * alone.abs().max()


def test_padding_is_remembered_when_the_mask_is_left_out_of_decoding(model):
    prompts = [random_tokens(length, seed=length) for length in (2, 9)]
    tokens, mask = padded(prompts)
    token = random_tokens(2, 1, seed=5)
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        logits = model(token, past_key_values=cache).logits[:, -1]
        alone = model(torch.cat([prompts[0], token[0]])[None]).logits[0, -1]
    assert (logits[0] - alone).abs().max() < 1e-10 * alone.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 7},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ],
)
def test_cache_does_not_change_beams_or_samples(model, options):
    prompts = [random_tokens(length, seed=length) for length in (4, 20)]
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(greedy(model, *padded(prompts), use_cache=use_cache, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "top_p": 0.9}, {"num_beams": 3, "do_sample": True}, {"num_beams": 4}]
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_changes_neither_samples_nor_beams(model, options, use_cache):
    """The same random numbers give the same tokens, however much padding stands before the prompt."""
    prompt, outputs = random_tokens(9, seed=4), []
    for padding in (0, 1, 6, 63):
        tokens = torch.cat([torch.zeros(padding, dtype=torch.long), prompt])[None]
        mask = (torch.arange(padding + 9) >= padding).long()[None]
        torch.manual_seed(0)
        outputs.append(greedy(model, tokens, mask, use_cache=use_cache, **options)[0, padding:])
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert len(set(outputs[0][9:].tolist())) > 1


def test_cache_sizes(model):
    """Windows hold the window, states are constant, full attention holds the tokens."""
    cache = HybridCache(model.config, max_length=300)
    sizes = []
    with torch.no_grad():
        for part in random_tokens(2, 300).split(100, 1):
            model(part, past_key_values=cache)
            sizes.append([{name: tuple(x.shape) for name, x in layer.tensors().items()} for layer in cache.layers])
    for kind, first, last in zip(model.config.layer_types, sizes[0], sizes[-1]):
        if kind == "attn":
            assert last["keys"] == (2, 2, 300, 4)
        else:
            assert first == last
    jet, swa, delta_net, _, gla = sizes[-1]
    assert jet == {"recurrent": (2, 2, 6, 9), "conv": (2, 3, 18)}
    assert swa == {"keys": (2, 2, 5, 4), "values": (2, 2, 5, 4)}
    assert delta_net == {"recurrent": (2, 2, 6, 9), "conv_q": (2, 2, 12), "conv_k": (2, 2, 12), "conv_v": (2, 2, 18)}
    assert gla == {"recurrent": (2, 2, 6, 9)}
    held = [x for layer in cache.layers for x in layer.tensors().values()]
    assert cache.num_bytes() == sum(x.numel() * x.element_size() for x in held)
    # No state is a view that keeps a prompt's activations alive.
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in held)


def test_appending_to_a_long_cache_rarely_copies_it(model):
    full = next(layer for layer in HybridCache(model.config).layers if type(layer) is KeyValueLayer)
    layout_cache = HybridCache(model.config)
    layout_cache.layers[3] = full
    buffers = set()
    with torch.no_grad():
        for token in random_tokens(1, 700).split(1, 1):
            model(token, past_key_values=layout_cache)
            buffers.add(full.keys.data_ptr())
    assert full.keys.shape[2] < 700 * 1.25 + 65
    assert len(buffers) <= 8  # 1.25 ** 8 * 65 > 700


def test_window_keys_are_overwritten_in_place(model):
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(random_tokens(1, 9), past_key_values=cache)
        ring = cache.layers[1]
        assert isinstance(ring, SlidingWindowLayer)
        before, place = ring.keys.clone(), ring.keys.data_ptr()
        model(random_tokens(1, 1), past_key_values=cache)
    changed = (ring.keys != before).any(-1).any(1)[0]
    assert ring.keys.data_ptr() == place
    assert changed.tolist() == [slot == 9 % 5 for slot in range(5)]


def test_a_cache_can_be_cleared_and_used_again(model):
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        cache = model(tokens, attention_mask=(tokens > 9).long(), use_cache=True).past_key_values
        cache.reset()
        again = model(tokens, past_key_values=cache).logits
    assert cache.get_seq_length() == 20
    assert torch.equal(again, model(tokens, use_cache=False).logits)


def test_gradients_flow_through_the_cache(model):
    """A sequence in three cached passes has the gradients of one pass."""
    tokens = random_tokens(2, 24)
    gradients = []
    for chunk in (24, 9):
        model.zero_grad()
        cache = HybridCache(model.config)
        logits = torch.cat([model(part, past_key_values=cache).logits for part in tokens.split(chunk, 1)], 1)
        logits.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, whole in gradients[0].items():
        assert (gradients[1][name] - whole).norm() <= 1e-9 * whole.norm(), name


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_generating_in_training_mode_with_gradient_checkpointing_gives_the_same_text(options):
    """As trainers do that generate between steps: no cache is kept, so the whole text is handed over each time."""
    model, tokens = random_model(), random_tokens(2, 9)
    expected = greedy(model, tokens, torch.ones_like(tokens), **options)
    model.gradient_checkpointing_enable()
    model.train()
    options.pop("prefill_chunk_size", None)
    assert torch.equal(greedy(model, tokens, torch.ones_like(tokens), **options), expected)
    cache = model.eval()(tokens, use_cache=True)[CACHE_NAME]
    model.train()
    with pytest.raises(ValueError, match="does not go with gradient checkpointing in training mode"):
        model(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="does not go with gradient checkpointing in training mode"):
        greedy(model, tokens, past_key_values=cache)


def test_the_cache_goes_by_both_names(model):
    """transformers 5.24 calls it `cache`; swallowed as an unknown argument it would be left out of every pass."""
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        for name in ("past_key_values", "cache"):
            cache = HybridCache(model.config)
            parts = [model(part, **{name: cache}).logits for part in tokens.split(4, 1)]
            assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10 * whole.abs().max(), name
            assert model.model(tokens, **{name: HybridCache(model.config)})[CACHE_NAME].get_seq_length() == 9
    with pytest.raises(ValueError, match="two names of one thing"):
        model(tokens, past_key_values=HybridCache(model.config), cache=HybridCache(model.config))
    assert CACHE_NAME in ("past_key_values", "cache") and CACHE_NAME in ALL_CACHE_NAMES


def test_other_caches_are_refused(model):
    with pytest.raises(ValueError, match="DynamicCache.*HybridCache"):
        model(random_tokens(1, 3), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        greedy(model, random_tokens(1, 3), cache_implementation="static")
    cache = HybridCache(model.config)
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 4), (2, 3)])
def test_masks_that_do_not_fit_are_refused(model, shape):
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(random_tokens(2, 4), attention_mask=torch.ones(shape))


def test_all_padding_is_harmless():
    model = random_model(config_dict(layer_types=["jet", "attn", "swa", "gla"]))
    tokens, cache = random_tokens(2, 6), HybridCache(model.config)
    with torch.no_grad():
        first = model(tokens[:, :2], attention_mask=torch.zeros(2, 2), past_key_values=cache).logits
        logits = model(
            tokens, attention_mask=torch.cat([torch.zeros(2, 2), torch.ones(2, 6)], 1), past_key_values=cache
        )
        expected = model(tokens, use_cache=False).logits
    assert first.isfinite().all()
    assert (logits.logits - expected).abs().max() < 1e-10 * expected.abs().max()
