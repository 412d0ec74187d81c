"""KL and cross-entropy on logits whose vocabulary is split over the tensor-parallel group."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_jet.configs.training import LOGIT_CHUNK_TOKENS


@dataclass(frozen=True)
class LogitLoss:
    """What to compute on logits.

    Attributes:
        kl: weight of the KL divergence between teacher and student.
        reverse: KL(student || teacher) instead of KL(teacher || student).
        temperature: both distributions are softened by it, and the KL is multiplied by its square, so that gradients
            keep their size (Hinton et al. 2015, section 2).
        cross_entropy: weight of the cross-entropy with the labels.
        chunk_tokens: tokens per chunk; only one chunk is ever held in fp32.
    """

    kl: float = 0.0
    reverse: bool = False
    temperature: float = 1.0
    cross_entropy: float = 0.0
    chunk_tokens: int = LOGIT_CHUNK_TOKENS


def vocab_parallel_log_softmax(logits: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """log_softmax over the whole vocabulary. No autograd: the losses below know their gradients in closed form.

    Args:
        logits: [n, vocab / tp] fp32.
        group: tensor-parallel group; None when the vocabulary is whole.

    Returns:
        [n, vocab / tp] fp32.
    """
    if group is None:
        return F.log_softmax(logits, dim=-1)
    peak = logits.amax(-1, keepdim=True)  # [n, 1]
    dist.all_reduce(peak, ReduceOp.MAX, group=group)
    shifted = logits - peak
    total = shifted.exp().sum(-1, keepdim=True)  # [n, 1]
    dist.all_reduce(total, group=group)
    return shifted - total.log()


class _LogitLosses(torch.autograd.Function):
    """Losses and gradient in one pass over chunks of tokens; the gradient takes the place of the student's logits."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, what: LogitLoss, group):
        needs_gradient = ctx.needs_input_grad[0]
        sums = student.new_zeros(2, dtype=torch.float32)  # KL, cross-entropy
        for start in range(0, student.shape[0], what.chunk_tokens):
            rows = slice(start, start + what.chunk_tokens)
            chunk_sums, gradient = _chunk(
                student[rows].float(),
                None if teacher is None else teacher[rows].float(),
                labels[rows],
                weights[rows],
                what,
                group,
            )
            sums += chunk_sums
            if needs_gradient:
                student[rows] = gradient
        ctx.gradient = student if needs_gradient else None
        loss = what.kl * sums[0] + what.cross_entropy * sums[1]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _):
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_loss.to(gradient.dtype)), None, None, None, None, None


def logit_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    what: LogitLoss,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted KL and cross-entropy over tokens.

    The gradient with respect to the logits is computed in the forward pass and written over them, so that no second
    tensor of their size exists. Do not use `student` afterwards when it requires a gradient.

    Args:
        student: [n, vocab / tp], any float type.
        teacher: the same shape; may be None when what.kl is 0.
        labels: [n] token ids in the whole vocabulary.
        weights: [n] fp32 weight of every token, for example mask / number of unmasked tokens in the global batch.
        what: weights of the terms.
        group: tensor-parallel group of more than one rank, or None.

    Returns:
        The scalar loss kl * KL + cross_entropy * CE, and [KL, CE] without gradient (fp32). Equal on all ranks of the
        group; the gradient of every shard is complete, so nothing is to be summed over the group.
    """
    if what.kl and teacher is None:
        raise ValueError("a KL term needs the teacher's logits")
    return _LogitLosses.apply(student, teacher if what.kl else None, labels, weights, what, group)


def _chunk(
    student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, what: LogitLoss, group
) -> tuple[Tensor, Tensor]:
    """[KL, CE] of one chunk and the gradient of their weighted sum. student, teacher [n, v] fp32."""
    kl_sum = ce_sum = student.new_zeros(())
    gradient = torch.zeros_like(student)
    log_s = None
    if what.cross_entropy:
        log_s = vocab_parallel_log_softmax(student, group)
        cross_entropy, ce_gradient = _cross_entropy(log_s, labels, group)
        ce_sum = (cross_entropy * weights).sum()
        gradient.add_(ce_gradient, alpha=what.cross_entropy)
    if teacher is not None:
        if log_s is None or what.temperature != 1:
            log_s = vocab_parallel_log_softmax(student / what.temperature, group)
        log_t = vocab_parallel_log_softmax(teacher / what.temperature, group)
        kl, kl_gradient = _divergence(log_s, log_t, what.reverse, group)
        kl_sum = what.temperature**2 * (kl * weights).sum()
        # d(T^2 KL) / d(logits) = T^2 * (1 / T) * d KL / d(logits / T)
        gradient.add_(kl_gradient, alpha=what.kl * what.temperature)
    return torch.stack([kl_sum, ce_sum]), gradient.mul_(weights[:, None])


def _divergence(log_s: Tensor, log_t: Tensor, reverse: bool, group) -> tuple[Tensor, Tensor]:
    """KL per token [n] and its gradient with respect to the student's (softened) logits [n, v]."""
    p_s = log_s.exp()
    difference = log_s - log_t
    if reverse:
        kl = _sum_over_vocab(p_s * difference, group)
        return kl, p_s * (difference - kl[:, None])
    p_t = log_t.exp()
    return _sum_over_vocab(-p_t * difference, group), p_s - p_t


def _cross_entropy(log_s: Tensor, labels: Tensor, group) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token [n] and its gradient with respect to the student's logits [n, v]."""
    first = 0 if group is None else dist.get_rank(group) * log_s.shape[-1]
    local = labels - first
    here = (local >= 0) & (local < log_s.shape[-1])
    index = local.clamp(0, log_s.shape[-1] - 1)[:, None]  # [n, 1]
    cross_entropy = -(log_s.gather(1, index)[:, 0] * here)
    if group is not None:
        dist.all_reduce(cross_entropy, group=group)
    gradient = log_s.exp()
    gradient.scatter_add_(1, index, -here[:, None].to(gradient.dtype))
    return cross_entropy, gradient


def _sum_over_vocab(x: Tensor, group) -> Tensor:
    """[n, v] -> [n], summed over all shards."""
    total = x.sum(-1)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
