"""What every registered mixer must do, on one process."""

import pytest
import torch

from layout_runs import next_token_loss, packed, train_step
from megatron_jet.configs.cost import model_cost
from megatron_jet.configs.errors import UserError
from megatron_jet.model.builder import build_model
from mixers.mixer_cases import ENTRIES, KINDS, model_with

# fp32, sums of at most a few hundred terms: 1e-5 relative leaves two orders of magnitude over rounding.
TOLERANCE = 1e-5


@pytest.fixture(params=KINDS)
def model(request):
    return model_with(ENTRIES[request.param], ENTRIES[request.param])


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))


def test_causality(model, single_rank):
    """Changing a token changes no earlier logits, and some later ones."""
    chunk = build_model(model, single_rank)[0]
    first = tokens(2, 70)
    second = first.clone()
    second[:, 40] = (second[:, 40] + 1) % 64
    with torch.no_grad():
        a, b = chunk(first, None, None), chunk(second, None, None)
    assert torch.equal(a[:, :40], b[:, :40])
    assert ((a - b).abs().amax(dim=(0, 2)) > 1e-6)[40:44].all()


@pytest.mark.parametrize("lengths", [[1, 2, 3, 17, 40], [64, 1, 7]], ids=str)
def test_packed_equals_separate(model, single_rank, lengths):
    """Logits and gradients of a packed row are those of its sequences one by one."""
    row = tokens(1, sum(lengths))
    together = train_step(model, single_rank, row, lengths=lengths)
    chunk = build_model(model, single_rank)[0]
    scored = sum(lengths) - len(lengths)
    logits = []
    for sequence in row.split(lengths, dim=1):
        logits.append(chunk(sequence, None, None))
        if sequence.shape[1] > 1:
            (next_token_loss(logits[-1], sequence) * (sequence.shape[1] - 1) / scored).backward()
    torch.testing.assert_close(together.logits, torch.cat(logits, dim=1), atol=TOLERANCE, rtol=TOLERANCE)
    for parameter in chunk.parameters():
        parameter.data = parameter.grad
    from megatron_jet.model.state import gather_tensors

    for key, grad in gather_tensors([chunk]).items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(together.grads[key], grad, atol=TOLERANCE * max(scale, 1e-3), rtol=1e-4, msg=key)


def test_dense_rows_are_independent(model, single_rank):
    """A row of a batch gives what it gives alone, at lengths below, at and above the chunk size."""
    chunk = build_model(model, single_rank)[0]
    for length in (1, 2, 63, 64, 65):
        batch = tokens(3, length)
        with torch.no_grad():
            whole, alone = chunk(batch, None, None), chunk(batch[1:2], None, None)
        torch.testing.assert_close(whole[1:2], alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_formula_equals_counted_parameters(model, single_rank):
    chunk = build_model(model, single_rank)[0]
    counted = sum(parameter.numel() for parameter in chunk.parameters())
    assert counted == model_cost(model, 128).total_params
    mixer = chunk.decoder.layers[0].self_attention
    assert sum(p.numel() for p in mixer.parameters()) == model.mixer(0).num_params(model.shape)


def test_bf16_is_close_to_fp32(model, single_rank):
    """bf16 keeps 8 bits: 2 layers of O(1) activations agree with fp32 within a few per cent of the logits' spread."""
    row = tokens(2, 65)
    exact = build_model(model, single_rank)[0](row, None, None)
    rounded = build_model(model, single_rank, dtype="bf16")[0]
    logits = rounded(row, None, None)
    next_token_loss(logits, row).backward()
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().mean() < 0.05 * exact.std()
    for name, parameter in rounded.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.dtype == (torch.float32 if name.endswith("A_log") else torch.bfloat16), name


def test_recomputation_changes_nothing(model, single_rank):
    row = tokens(2, 30)
    plain = train_step(model, single_rank, row)
    again = train_step(model, single_rank, row, recompute=True)
    assert torch.equal(plain.logits, again.logits)
    assert all(torch.equal(grad, again.grads[key]) for key, grad in plain.grads.items())


def test_masks_are_refused(model, single_rank):
    chunk = build_model(model, single_rank)[0]
    with pytest.raises(ValueError, match="packed_seq_params"):
        chunk(tokens(1, 4), None, torch.zeros(1, 1, 4, 4, dtype=torch.bool))


def test_heads_that_do_not_divide_are_refused(model):
    from megatron_jet.configs.training import ParallelConfig

    with pytest.raises(UserError, match="do not divide by tensor_parallel=3"):
        build_model(model, ParallelConfig(tensor=3))


def test_packing_is_described_by_its_bounds():
    assert packed([1, 3]).cu_seqlens_q.tolist() == [0, 1, 4]
