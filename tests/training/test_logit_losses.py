"""KL and cross-entropy on sharded logits against dense autograd."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_jet.configs.training import ParallelConfig
from megatron_jet.training.vocab_parallel import LogitLoss, logit_losses, vocab_parallel_log_softmax

TOKENS, VOCAB = 11, 24
CASES = {
    "forward": LogitLoss(kl=1.0, chunk_tokens=4),
    "reverse": LogitLoss(kl=0.5, reverse=True, chunk_tokens=4),
    "soft": LogitLoss(kl=2.0, temperature=3.0, chunk_tokens=4),
    "soft reverse": LogitLoss(kl=1.5, reverse=True, temperature=0.5, chunk_tokens=100),
    "cross-entropy": LogitLoss(cross_entropy=0.7, chunk_tokens=5),
    "both": LogitLoss(kl=0.3, cross_entropy=1.2, temperature=2.0, chunk_tokens=3),
}


def inputs(scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, VOCAB, generator=generator) * scale for _ in range(2))
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) > 0.3)
    return student, teacher, labels, weights


def dense(what: LogitLoss, student, teacher, labels, weights):
    """The definition, by autograd: loss, [KL, CE], gradient."""
    student = student.clone().requires_grad_()
    log_s, log_t = (F.log_softmax(x / what.temperature, -1) for x in (student, teacher))
    p, log_p, log_q = (log_s.exp(), log_s, log_t) if what.reverse else (log_t.exp(), log_t, log_s)
    kl = what.temperature**2 * ((p * (log_p - log_q)).sum(-1) * weights).sum()
    ce = (F.cross_entropy(student, labels, reduction="none") * weights).sum()
    loss = what.kl * kl + what.cross_entropy * ce
    loss.backward()
    return loss.detach(), torch.stack([kl, ce]).detach(), student.grad


def sharded(what: LogitLoss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    student, teacher, labels, weights = inputs()
    shard = slice(group.rank() * VOCAB // group.size(), (group.rank() + 1) * VOCAB // group.size())
    leaf = student[:, shard].clone().requires_grad_()
    loss, sums = logit_losses(leaf * 1.0, teacher[:, shard].clone(), labels, weights, what, group)
    loss.backward()
    return loss.detach(), sums, leaf.grad


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_autograd(name):
    what, (student, teacher, labels, weights) = CASES[name], inputs()
    loss, sums, gradient = dense(what, student, teacher, labels, weights)
    leaf = student.clone().requires_grad_()
    got, got_sums = logit_losses(leaf * 1.0, teacher, labels, weights, what)
    (got * 2.5).backward()
    torch.testing.assert_close(got.detach(), loss)
    for i, active in enumerate((what.kl, what.cross_entropy)):
        torch.testing.assert_close(got_sums[i], sums[i] if active else torch.zeros(()))
    torch.testing.assert_close(leaf.grad, 2.5 * gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_tensor_parallel_equals_dense_autograd(pool, name):
    loss, sums, gradient = dense(CASES[name], *inputs())
    results = pool.run(sharded, CASES[name], layout=ParallelConfig(tensor=2))
    for got, _, _ in results:
        torch.testing.assert_close(got, loss)
    torch.testing.assert_close(torch.cat([g for _, _, g in results], -1), gradient, atol=1e-6, rtol=1e-5)
    assert torch.equal(results[0][1], results[1][1])


def test_no_gradient_leaves_logits_alone():
    student, teacher, labels, weights = inputs()
    before = student.clone()
    with torch.no_grad():
        logit_losses(student, teacher, labels, weights, CASES["both"])
    assert torch.equal(student, before)


def test_equal_models_have_no_kl_and_no_gradient():
    student, _, labels, weights = inputs()
    leaf = student.clone().requires_grad_()
    loss, _ = logit_losses(leaf * 1.0, student, labels, weights, CASES["reverse"])
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert leaf.grad.abs().max() < 1e-6


def test_large_logits_stay_finite_and_unscored_tokens_get_no_gradient():
    student, teacher, labels, weights = inputs(scale=1e4)
    weights[0] = 0.0
    leaf = student.clone().requires_grad_()
    loss, _ = logit_losses(leaf * 1.0, teacher, labels, weights, CASES["both"])
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()
    assert leaf.grad[0].abs().max() == 0


def test_bf16_logits_are_handled_in_fp32():
    student, teacher, labels, weights = (x.bfloat16() if x.is_floating_point() else x for x in inputs())
    loss, _, gradient = dense(CASES["forward"], student.float(), teacher.float(), labels, weights.float())
    leaf = student.clone().requires_grad_()
    got, _ = logit_losses(leaf * 1.0, teacher, labels, weights.float(), CASES["forward"])
    got.backward()
    torch.testing.assert_close(got.detach(), loss)  # fp32 inside, from the same bf16 numbers
    assert leaf.grad.dtype == torch.bfloat16
    # the gradient is rounded once to bf16: relative error at most 2^-8 per element
    torch.testing.assert_close(leaf.grad.float(), gradient, rtol=2**-8, atol=1e-7)


def test_kl_needs_a_teacher():
    student, _, labels, weights = inputs()
    with pytest.raises(ValueError, match="teacher"):
        logit_losses(student, None, labels, weights, CASES["both"])


def test_log_softmax_of_one_group_member_is_torch_s():
    student = inputs()[0]
    got = vocab_parallel_log_softmax(student, None, torch.empty_like(student))
    assert torch.equal(got, F.log_softmax(student, -1))
