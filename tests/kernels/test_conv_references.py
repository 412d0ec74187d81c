"""The reference convolutions against a token loop, and packed batches, states and chunks against one long run."""

import pytest
import torch
import torch.nn.functional as F

from jet_kernels.dynamic_conv.reference import dynamic_causal_conv
from jet_kernels.norm_gate.reference import rms_norm_gated
from jet_kernels.short_conv.reference import causal_conv


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def loop_conv(x, kernel, state):
    """y_t = sum over w of kernel[t, :, w] * input[t - (W - 1) + w], written out token by token."""
    inputs, width = torch.cat([state, x], 1), kernel.shape[-1]
    rows = [(inputs[:, t : t + width].mT * kernel[:, t]).sum(-1) for t in range(x.shape[1])]
    return torch.stack(rows, 1), inputs[:, inputs.shape[1] - (width - 1) :]


def assert_same(actual, expected, wrt):
    """Equal values and gradients for the same output gradients, to fp64 rounding of sums of at most 4 products."""
    found = []
    for results in (actual, expected):
        loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results)
        found.append([*results, *torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True)])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("time", [1, 2, 7])
def test_dynamic_conv_equals_token_loop(time, width, activation):
    x, kernel, state = normal(2, time, 3), normal(2, time, 3, width), normal(2, width - 1, 3)
    actual = dynamic_causal_conv(x, kernel, initial_state=state, output_final_state=True, activation=activation)
    y, final = loop_conv(x, kernel, state)
    assert_same(actual, (F.silu(y) if activation else y, final), (x, kernel, state))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_conv_equals_conv1d(width, activation):
    x, weight, bias = normal(2, 7, 3), normal(3, width), normal(3)
    y = F.conv1d(F.pad(x.mT, (width - 1, 0)), weight.unsqueeze(1), bias, groups=3).mT
    actual, final = causal_conv(x, weight, bias=bias, activation=activation)
    assert final is None
    assert_same((actual,), (F.silu(y) if activation else y,), (x, weight, bias))


def run_conv(kind, x, weight, **options):
    return (dynamic_causal_conv if kind == "dynamic" else causal_conv)(x, weight, output_final_state=True, **options)


# Sequences shorter than the kernel (1, 2), empty ones, and longer ones.
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "short"])
def test_conv_packed_equals_separate(kind, with_state):
    lengths, width, dim = [1, 2, 0, 5, 3], 4, 3
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x = normal(1, sum(lengths), dim)
    weight = normal(1, sum(lengths), dim, width) if kind == "dynamic" else normal(dim, width)
    state = normal(len(lengths), width - 1, dim) if with_state else torch.zeros(len(lengths), width - 1, dim).double()
    packed = run_conv(kind, x, weight, initial_state=state if with_state else None, cu_seqlens=bounds.int())
    outputs, finals = [], []
    for n, (a, b) in enumerate(zip(bounds[:-1], bounds[1:])):
        kernel = weight[:, a:b] if kind == "dynamic" else weight.expand(1, int(b - a), dim, width)
        y, final = loop_conv(x[:, a:b], kernel, state[n : n + 1]) if b > a else (x[:, a:b], state[n : n + 1])
        outputs.append(y)
        finals.append(final)
    wrt = (x, weight, state) if with_state else (x, weight)
    assert_same(packed, (torch.cat(outputs, 1), torch.cat(finals)), wrt)


@pytest.mark.parametrize("kind", ["dynamic", "short"])
def test_conv_in_pieces_equals_whole(kind):
    # Pieces of 1 and 2 tokens are shorter than the state of 3.
    x = normal(2, 9, 3)
    weight = normal(2, 9, 3, 4) if kind == "dynamic" else normal(3, 4)
    expected = run_conv(kind, x, weight)
    pieces, state, start = [], None, 0
    for length in (1, 2, 1, 4, 1):
        part = weight[:, start : start + length] if kind == "dynamic" else weight
        y, state = run_conv(kind, x[:, start : start + length], part, initial_state=state)
        pieces.append(y)
        start += length
    assert_same((torch.cat(pieces, 1), state), expected, (x, weight))


def test_conv_gradcheck():
    x, kernel, state = normal(1, 4, 2), normal(1, 4, 2, 3), normal(2, 2, 2)
    cu_seqlens = torch.tensor([0, 1, 4])
    for function, weight in ((dynamic_causal_conv, kernel), (causal_conv, normal(2, 3))):

        def conv(x, weight, state, function=function):
            return function(
                x, weight, initial_state=state, cu_seqlens=cu_seqlens, output_final_state=True, activation="silu"
            )

        assert torch.autograd.gradcheck(conv, (x, weight, state))


def test_conv_keeps_dtype_and_sums_in_fp32():
    x, kernel = normal(1, 20, 8).bfloat16(), normal(1, 20, 8, 4).bfloat16()
    exact, _ = dynamic_causal_conv(x.double(), kernel.double())
    actual, final = dynamic_causal_conv(x, kernel, output_final_state=True)
    assert actual.dtype == final.dtype == torch.bfloat16
    # One rounding to bf16 is at most 2^-8; sums in bf16 would lose several.
    torch.testing.assert_close(actual.double(), exact, rtol=2**-7.9, atol=1e-6)


def test_conv_bad_input_is_named():
    x = normal(1, 5, 2)
    for function, weight in ((dynamic_causal_conv, normal(1, 5, 2, 3)), (causal_conv, normal(2, 3))):
        with pytest.raises(ValueError, match="conv state has shape"):
            function(x, weight, initial_state=torch.zeros(1, 3, 2))
        with pytest.raises(ValueError, match="cu_seqlens"):
            function(x, weight, cu_seqlens=torch.tensor([0, 4]))
        with pytest.raises(ValueError, match="activation"):
            function(x, weight, activation="relu")
    with pytest.raises(ValueError, match="kernel has shape"):
        dynamic_causal_conv(x, normal(1, 4, 2, 3))
    with pytest.raises(ValueError, match="weight has shape"):
        causal_conv(x, normal(3, 3))


def test_rms_norm_gated():
    x, weight, gate = normal(2, 3, 5), normal(5), normal(2, 3, 5, seed=1)
    expected = F.rms_norm(x, (5,), weight, 1e-3) * gate * gate.sigmoid()
    torch.testing.assert_close(rms_norm_gated(x, weight, gate, 1e-3), expected, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *a: rms_norm_gated(*a, 1e-3), (x, weight, gate))
    low = [a.detach().bfloat16() for a in (x, weight, gate)]
    exact = rms_norm_gated(*(a.double() for a in low), 1e-3)
    torch.testing.assert_close(rms_norm_gated(*low, 1e-3).double(), exact, rtol=2**-7.9, atol=1e-6)  # one rounding
