"""Chunked gated linear attention equals the recurrence, dense and packed, forward and backward."""

import pytest
import torch

from jet_kernels.gla.reference import chunk_gla, recurrent_gla


def draw_inputs(batch, time, heads=2, key_dim=6, value_dim=10, sequences=None, decay=1.0):
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": normal(batch, time, heads, key_dim),
        "k": normal(batch, time, heads, key_dim),
        "v": normal(batch, time, heads, value_dim),
        "gk": -normal(batch, time, heads, key_dim).abs() * decay,
        "initial_state": normal(sequences or batch, heads, key_dim, value_dim),
    }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def run(function, inputs, **options):
    """Output, final state and all gradients, for fixed random output gradients."""
    o, state = function(**inputs, output_final_state=True, **options)
    loss = sum(
        (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)).sum()
        for n, x in enumerate((o, state))
    )
    return o, state, *torch.autograd.grad(loss, list(inputs.values()))


def error_ratios(actual, expected):
    """RMS(error) / RMS(expected) of each result; NaN counts as wrong because no comparison with it is true."""
    return [
        ((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp(min=1e-30)).item()
        for a, e in zip(actual, expected)
    ]


# fp64 rounds at 1e-16; sums over 130 tokens leave 1e-12 far above that.
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("time", [1, 2, 3, 63, 64, 65, 130])
def test_gla_chunked_equals_recurrent(time, chunk_size):
    inputs = draw_inputs(2, time)
    expected = run(recurrent_gla, inputs, scale=0.7)
    assert max(error_ratios(run(chunk_gla, inputs, scale=0.7, chunk_size=chunk_size), expected)) < 1e-12


def test_gla_default_scale_and_zero_state():
    inputs = draw_inputs(2, 40)
    del inputs["initial_state"]
    expected = run(recurrent_gla, inputs | {"q": inputs["q"] * 6**-0.5}, scale=1.0)
    for function in (chunk_gla, recurrent_gla):
        o, state = function(**inputs, output_final_state=True)
        assert max(error_ratios((o, state), expected)) < 1e-12
        assert function(**inputs)[1] is None


@pytest.mark.parametrize("lengths", [[3, 67, 0, 64, 1, 2], [1], [5, 5, 5], [0, 130]])
@pytest.mark.parametrize("function", [chunk_gla, recurrent_gla])
def test_gla_packed_equals_separate(function, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = draw_inputs(1, int(bounds[-1]), sequences=len(lengths))
    packed = run(function, inputs, cu_seqlens=bounds.int())

    def one_by_one(initial_state, output_final_state, **tokens):
        outputs, states = [], []
        for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:])):
            state = initial_state[n : n + 1]
            if b > a:
                part = {name: x[:, a:b] for name, x in tokens.items()}
                o, state = recurrent_gla(**part, initial_state=state, output_final_state=True)
                outputs.append(o)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    assert max(error_ratios(packed, run(one_by_one, inputs))) < 1e-12


# At e^-20 a token the usual factored form needs exp(+1260) inside a chunk of 64. fp32 rounds at 6e-8.
@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0, 20.0])
def test_gla_fp32_error_at_any_decay(decay):
    rounded = {
        name: x.detach().float().requires_grad_()
        for name, x in draw_inputs(1, 130, key_dim=32, value_dim=32, decay=decay).items()
    }
    exact = {name: x.detach().double().requires_grad_() for name, x in rounded.items()}
    actual = run(chunk_gla, rounded)
    assert all(x.isfinite().all() for x in actual)
    assert max(error_ratios(actual, run(recurrent_gla, exact))) < 2e-6


@pytest.mark.parametrize("function", [chunk_gla, recurrent_gla])
def test_gla_gradcheck(function):
    inputs = draw_inputs(1, 9, heads=1, key_dim=2, value_dim=1, sequences=2)
    options = {"cu_seqlens": torch.tensor([0, 1, 9]), "output_final_state": True}
    assert torch.autograd.gradcheck(
        lambda *args: function(**dict(zip(inputs, args)), **options), tuple(inputs.values()), fast_mode=False
    )


def test_gla_bad_input_is_named():
    for function in (chunk_gla, recurrent_gla):
        with pytest.raises(ValueError, match="cu_seqlens"):
            function(**draw_inputs(1, 10), cu_seqlens=torch.tensor([0, 4, 9]))
    with pytest.raises(ValueError, match="power of two"):
        chunk_gla(**draw_inputs(1, 10), chunk_size=48)
