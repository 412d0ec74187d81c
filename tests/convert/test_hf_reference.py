"""Random configs against the independent token-by-token reference: dense, packed, padded, in chunks of any length.

Everything runs in fp64, where rounding is about 1e-16 per operation. A few hundred dependent operations and
the cancellation in the delta rule make that 1e-14 of the logits' size, as measured; 1e-10 is the tolerance.
"""

import pytest
import torch

from convert import hf_reference
from convert.hf_cases import config_dict, numpy_weights, random_model, random_tokens
from megatron_jet.convert.hf.cache import HybridCache

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

TOLERANCE = 1e-10
# Shrinking a failure takes minutes; the failing config is printed anyway.
few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def mixer_settings(draw, kind: str) -> dict:
    head_dim = draw(st.sampled_from([2, 3, 6, 8]))
    head_v_dim = draw(st.sampled_from([1, 2, 5, 8, 16]))  # not always a multiple of head_dim
    heads = draw(st.sampled_from([1, 2, 3, 12]))
    eps = draw(st.sampled_from([1e-5, 1e-3]))
    settings = {
        "num_heads": heads,
        "head_dim": head_dim,
        "expand_v": float(f"{head_v_dim / head_dim:.10f}"),  # as the published 2.6666666667
        "norm_eps": draw(st.sampled_from([eps, str(eps)])),
    }
    if kind == "gla":
        return {**settings, "gate_low_rank_dim": 2, "gate_logit_normalizer": draw(st.sampled_from([1.0, 16.0]))}
    settings["conv_size"] = draw(st.sampled_from([1, 2, 3, 4]))
    if kind == "jet":
        settings["dconv_generator_reduction"] = draw(st.integers(1, heads * head_v_dim))
    return settings


@st.composite
def configs(draw) -> dict:
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (12, 3)]))
    linear = {kind: draw(mixer_settings(kind)) for kind in ("jet", "gated_delta_net", "gla")}
    kinds = draw(st.lists(st.sampled_from(["jet", "jet", "attn", "swa", *linear]), min_size=1, max_size=4))
    windows = [draw(st.integers(1, 12)) if kind == "swa" else None for kind in kinds]
    return {
        "vocab_size": 29,
        "hidden_size": heads * 4,
        "intermediate_size": 12,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([None, 2, 6])),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "rope_theta": draw(st.sampled_from([100.0, 1e6])),
        "tie_word_embeddings": draw(st.booleans()),
        "layer_types": kinds,
        "windows": windows,
        "efficient_attention_config": linear,
    }


def reference_logits(config, model, *sequences) -> list[torch.Tensor]:
    weights = numpy_weights(model)
    return [
        torch.from_numpy(hf_reference.forward(config, weights, tokens.numpy())[0])
        if len(tokens)
        else torch.zeros(0, config["vocab_size"], dtype=torch.float64)
        for tokens in sequences
    ]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    if found.numel() == 0:
        return
    assert (found - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item())


@few
@given(configs(), st.integers(1, 40), st.integers(0, 9))
def test_whole_sequence(config, length, seed):
    model, tokens = random_model(config, seed), random_tokens(2, length, seed=seed)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    for row in range(2):
        logits, hidden = hf_reference.forward(config, numpy_weights(model), tokens[row].numpy())
        assert_close(out.logits[row], torch.from_numpy(logits))
        for mine, other in zip(out.hidden_states, hidden, strict=True):
            assert_close(mine[row], torch.from_numpy(other))


@few
@given(configs(), st.lists(st.integers(1, 12), min_size=1, max_size=5), st.booleans(), st.data())
def test_packed_documents(config, lengths, padded, data):
    """Two rows of packed documents, with or without padding among them, in one pass and in chunks through the cache."""
    model = random_model(config)
    layouts = [lengths, lengths[::-1]]
    rows = [random_tokens(sum(lengths), seed=seed) for seed in (1, 2)]
    expected = [torch.cat(reference_logits(config, model, *row.split(layout))) for row, layout in zip(rows, layouts)]
    total = sum(lengths) + (5 if padded else 0)
    tokens, positions, mask = (torch.zeros(2, total, dtype=torch.long) for _ in range(3))
    for n, (row, layout) in enumerate(zip(rows, layouts)):
        real = torch.randperm(total, generator=torch.Generator().manual_seed(n))[: sum(lengths)].sort().values
        tokens[n, real], mask[n, real] = row, 1
        positions[n, real] = torch.cat([torch.arange(length) for length in layout])
    chunks = data.draw(chunk_lengths(total))
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask if padded else None, position_ids=positions, use_cache=False).logits
        cache, end, out = HybridCache(model.config), 0, []
        for part in chunks:
            here = slice(end, end + part)
            end += part
            seen = mask[:, :end] if padded else None
            inputs = {"attention_mask": seen, "position_ids": positions[:, here], "past_key_values": cache}
            out.append(model(tokens[:, here], **inputs).logits)
    for logits in (whole, torch.cat(out, 1)):
        for n in range(2):
            assert_close(logits[n][mask[n].bool()], expected[n])


@st.composite
def chunk_lengths(draw, total: int) -> list[int]:
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=6))) if total > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


@few
@given(configs(), st.integers(1, 40), st.data())
def test_padding_anywhere_changes_nothing(config, length, data):
    """A random mask (so pads left, right and in between) gives each row what its real tokens alone give.

    In one pass, and in chunks through the cache, where whole chunks of a row may be padding; the
    positions are the model's own default, which leaves padding out.
    """
    model = random_model(config)
    tokens = random_tokens(3, length)
    density = data.draw(st.sampled_from([0.2, 0.5, 0.9]))
    mask = (torch.rand(3, length, generator=torch.Generator().manual_seed(length)) < density).long()
    expected = reference_logits(config, model, *[row[keep.bool()] for row, keep in zip(tokens, mask)])
    chunks = data.draw(chunk_lengths(length))
    with torch.no_grad():
        whole = model(tokens, attention_mask=mask, use_cache=False).logits
        cache, end, out = HybridCache(model.config), 0, []
        for part in tokens.split(chunks, 1):
            end += part.shape[1]
            out.append(model(part, attention_mask=mask[:, :end], past_key_values=cache).logits)
    for logits in (whole, torch.cat(out, 1)):
        assert logits.isfinite().all()
        for row in range(3):
            assert_close(logits[row][mask[row].bool()], expected[row])


@few
@given(configs(), st.integers(1, 24), st.integers(1, 12), st.integers(0, 9))
def test_prefill_then_token_by_token(config, prompt, steps, seed):
    model, tokens = random_model(config, seed), random_tokens(2, prompt + steps, seed=seed)
    cache = HybridCache(model.config)
    with torch.no_grad():
        out = [model(tokens[:, :prompt], past_key_values=cache).logits]
        out += [model(token, past_key_values=cache).logits for token in tokens[:, prompt:].split(1, 1)]
    for row, expected in enumerate(reference_logits(config, model, *tokens)):
        assert_close(torch.cat(out, 1)[row], expected)


def test_a_sequence_longer_than_the_chunks_of_the_recurrence():
    config = config_dict()
    model, tokens = random_model(config), random_tokens(1, 150)
    with torch.no_grad():
        assert_close(model(tokens).logits[0], reference_logits(config, model, tokens[0])[0])
