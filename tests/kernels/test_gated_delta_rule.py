"""The chunked gated delta rule equals the recurrence, dense and packed, forward and backward."""

import pytest
import torch

from jet_kernels.gated_delta_rule.reference import (
    chunk_gated_delta_rule,
    l2_normalize,
    recurrent_gated_delta_rule,
)

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def draw_inputs(batch, time, heads=2, key_dim=6, value_dim=10, sequences=None, decay=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": l2_normalize(normal(batch, time, heads, key_dim)),
        "k": l2_normalize(normal(batch, time, heads, key_dim)),
        "v": normal(batch, time, heads, value_dim),
        "g": -normal(batch, time, heads).abs() * decay,
        "beta": normal(batch, time, heads).sigmoid(),
        "initial_state": normal(sequences or batch, heads, key_dim, value_dim),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


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


# fp64 rounds at 1e-16; sums of up to 130 terms and a triangular solve of size 64 leave 1e-12 far above that.
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("time", [1, 2, 3, 63, 64, 65, 130])
def test_chunked_equals_recurrent(time, chunk_size):
    inputs = draw_inputs(2, time)
    expected = run(recurrent_gated_delta_rule, inputs, scale=0.7)
    actual = run(chunk_gated_delta_rule, inputs, scale=0.7, chunk_size=chunk_size)
    assert max(error_ratios(actual, expected)) < 1e-12


def test_default_scale_and_zero_state():
    inputs = draw_inputs(2, 40)
    del inputs["initial_state"]
    expected = run(recurrent_gated_delta_rule, inputs | {"q": inputs["q"] * 6**-0.5}, scale=1.0)
    for function in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        o, state = function(**inputs, output_final_state=True)
        assert max(error_ratios((o, state), expected)) < 1e-12
        assert function(**inputs)[1] is None


# Lengths around chunk boundaries, length 1, and an empty sequence.
@pytest.mark.parametrize("lengths", [[3, 67, 0, 64, 1, 2], [1], [5, 5, 5], [0, 130]])
@pytest.mark.parametrize("function", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
def test_packed_equals_separate(function, lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = draw_inputs(1, int(bounds[-1]), sequences=len(lengths))
    packed = run(function, inputs, cu_seqlens=bounds.int())

    def one_by_one(initial_state, output_final_state, **tokens):
        outputs, states = [], []
        for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:])):
            state = initial_state[n : n + 1]
            if b > a:
                part = {name: x[:, a:b] for name, x in tokens.items()}
                o, state = recurrent_gated_delta_rule(**part, initial_state=state, output_final_state=True)
                outputs.append(o)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    assert max(error_ratios(packed, run(one_by_one, inputs))) < 1e-12


# With decay e^-20 a token, running sums reach -2600 and every factor a chunk may form underflows or overflows.
# fp32 rounds at 6e-8; the error of products over a chunk of 32 stays within 3e-6 of the RMS.
@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0, 20.0])
def test_fp32_error_at_any_decay(decay):
    exact = draw_inputs(1, 130, key_dim=32, value_dim=32, decay=decay)
    rounded = {name: x.detach().float().requires_grad_() for name, x in exact.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in rounded.items()}
    actual = run(chunk_gated_delta_rule, rounded)
    assert all(x.isfinite().all() for x in actual)
    assert max(error_ratios(actual, run(recurrent_gated_delta_rule, exact))) < 3e-6


def test_one_strong_decay_among_weak_ones():
    # A reset in mid-chunk: a difference of fp32 running sums would lose the weak decays after it.
    exact = draw_inputs(1, 64, key_dim=16, value_dim=16, decay=0.01)
    g = exact["g"].detach().clone()
    g[:, ::9] = -2000.0
    rounded = {name: x.detach().float().requires_grad_() for name, x in (exact | {"g": g}).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in rounded.items()}
    actual = run(chunk_gated_delta_rule, rounded, chunk_size=64)
    assert max(error_ratios(actual, run(recurrent_gated_delta_rule, exact))) < 3e-6


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
def test_gradcheck(function):
    inputs = draw_inputs(1, 5, heads=1, key_dim=2, value_dim=2, sequences=2)
    options = {"cu_seqlens": torch.tensor([0, 2, 5]), "output_final_state": True}
    options |= {"chunk_size": 2} if function is chunk_gated_delta_rule else {}
    assert torch.autograd.gradcheck(
        lambda *args: function(**dict(zip(NAMES, args)), **options), tuple(inputs.values()), fast_mode=False
    )


def test_state_carries_over():
    inputs = draw_inputs(1, 50)
    whole, last = chunk_gated_delta_rule(**inputs, output_final_state=True)
    first = {name: x[:, :33] for name, x in inputs.items() if name != "initial_state"}
    rest = {name: x[:, 33:] for name, x in inputs.items() if name != "initial_state"}
    a, state = chunk_gated_delta_rule(**first, initial_state=inputs["initial_state"], output_final_state=True)
    b, state = recurrent_gated_delta_rule(**rest, initial_state=state, output_final_state=True)
    assert max(error_ratios((torch.cat([a, b], 1), state), (whole, last))) < 1e-12


@pytest.mark.parametrize("function", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
def test_bf16_inputs_keep_an_fp32_state(function):
    inputs = draw_inputs(1, 70, dtype=torch.bfloat16)
    exact = {name: x.detach().double() for name, x in inputs.items()}
    o, state = function(**inputs, output_final_state=True)
    expected = recurrent_gated_delta_rule(**exact, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    ratio_o, ratio_state = error_ratios((o, state), expected)
    assert ratio_o < 2**-8  # only the output is rounded to bf16
    assert ratio_state < 3e-6


def test_no_work_per_token():
    # The autograd graph of the chunked form grows with chunks, not with tokens.
    def graph_size(time):
        seen, stack = set(), [chunk_gated_delta_rule(**draw_inputs(1, time, key_dim=2, value_dim=2))[0].grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [parent for parent, _ in node.next_functions]
        return len(seen)

    assert graph_size(1024) - graph_size(512) < 200  # 16 more chunks of 32


def test_l2_normalize():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(l2_normalize(x), expected, rtol=1e-14)
    zero = torch.zeros(2, 4, requires_grad=True)
    l2_normalize(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 7, 4, 10])}, "cu_seqlens"),
        ({"initial_state": torch.zeros(1, 2, 6, 9)}, "initial_state has shape"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = draw_inputs(1, 10) | change
    for function in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        with pytest.raises(ValueError, match=message):
            function(**inputs)
    with pytest.raises(ValueError, match="power of two"):
        chunk_gated_delta_rule(**draw_inputs(1, 10), chunk_size=48)
