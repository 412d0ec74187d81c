"""Our core attention against a plain softmax with a mask, for every way it has of computing a window."""

import pytest
import torch

from megatron_jet.mixers.sdpa import causal_attention


def plain_attention(query, key, value, window):
    """[b, n, s, d] by the definition: key j is visible from query i iff i - window < j <= i."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    visible = (j <= i) & (j > i - (window or length))
    scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("window", [None, 1, 2, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize("length", [1, 5, 64, 128, 129, 300])
def test_every_window_and_length(window, length):
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, 4, length, 6), (2, 2, length, 6), (2, 2, length, 6))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weight = torch.randn(2, 4, length, 6, generator=generator, dtype=torch.float64)
    found = causal_attention(*inputs, window)
    expected = plain_attention(*inputs, window)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    grads = torch.autograd.grad((found * weight).sum(), inputs)
    for grad, reference in zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-12, rtol=1e-12)
