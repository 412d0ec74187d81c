"""KL and cross-entropy on logits whose vocabulary is split over the tensor-parallel group."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
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


def vocab_parallel_log_softmax(logits: Tensor, group: ProcessGroup | None, out: Tensor) -> Tensor:
    """log_softmax over the whole vocabulary. No autograd: the losses below know their gradients in closed form.

    Args:
        logits: [n, vocab / tp] fp32; overwritten when the vocabulary is split.
        group: tensor-parallel group; None when the vocabulary is whole.
        out: the same shape; takes the result.

    Returns:
        `out`.
    """
    if group is None:
        return torch.log_softmax(logits, -1, out=out)
    peak = logits.amax(-1, keepdim=True)  # [n, 1]
    dist.all_reduce(peak, ReduceOp.MAX, group=group)
    logits.sub_(peak)
    total = torch.exp(logits, out=out).sum(-1, keepdim=True)  # [n, 1]
    dist.all_reduce(total, group=group)
    return torch.sub(logits, total.log_(), out=out)


class _LogitLosses(torch.autograd.Function):
    """Losses and gradient in one pass over chunks of tokens; the gradient takes the place of the student's logits."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor, what: LogitLoss, group):
        needs_gradient = ctx.needs_input_grad[0]
        sums = student.new_zeros(2, dtype=torch.float32)  # KL, cross-entropy
        chunks = _Chunks(min(what.chunk_tokens, student.shape[0]), student, what, group)
        for start in range(0, student.shape[0], what.chunk_tokens):
            rows = slice(start, start + what.chunk_tokens)
            targets = None if teacher is None else teacher[rows]
            chunk_sums, gradient = chunks.losses(student[rows], targets, labels[rows], weights[rows])
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


class _Chunks:
    """The fp32 buffers [chunk, vocab / tp] that all chunks share: at most LOGIT_CHUNK_TENSORS.

    Args:
        rows: tokens of the largest chunk.
        like: the logits, whose width and device count.
        what: the terms.
        group: tensor-parallel group, or None.
    """

    def __init__(self, rows: int, like: Tensor, what: LogitLoss, group: ProcessGroup | None):
        self.what, self.group = what, group
        count = 2 + bool(what.kl) + bool(what.kl and what.cross_entropy)
        self._buffers = [like.new_empty(rows, like.shape[1], dtype=torch.float32) for _ in range(count)]

    def losses(self, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """[KL, CE] of one chunk, and the gradient of their weighted sum in one of the buffers.

        student, teacher [n, v]; n at most as large as the buffers.
        """
        what = self.what
        work, gradient, *others = (buffer[: student.shape[0]] for buffer in self._buffers)
        kl_sum = ce_sum = weights.new_zeros(())
        if what.cross_entropy:
            log_s = vocab_parallel_log_softmax(work.copy_(student), self.group, out=gradient)
            ce_sum = (_cross_entropy_(log_s, labels, self.group) * weights).sum()
            gradient.mul_(what.cross_entropy)
        if teacher is not None:
            log_s, log_t = others if what.cross_entropy else (gradient, *others)
            for logits, out in ((student, log_s), (teacher, log_t)):
                work.copy_(logits)
                if what.temperature != 1:
                    work.div_(what.temperature)
                vocab_parallel_log_softmax(work, self.group, out=out)
            kl = _divergence_(log_s, log_t, work, what.reverse, self.group)
            kl_sum = what.temperature**2 * (kl * weights).sum()
            # d(T^2 KL) / d(logits) = T^2 * (1 / T) * d KL / d(logits / T)
            log_s.mul_(what.kl * what.temperature)
            if what.cross_entropy:
                gradient.add_(log_s)
        return torch.stack([kl_sum, ce_sum]), gradient.mul_(weights[:, None])


def _divergence_(log_s: Tensor, log_t: Tensor, work: Tensor, reverse: bool, group) -> Tensor:
    """KL per token [n]; its gradient with respect to the student's (softened) logits takes the place of log_s [n, v].

    log_t and work are overwritten.
    """
    if reverse:
        p_s = torch.exp(log_s, out=work)
        difference = log_s.sub_(log_t)
        kl = _sum_over_vocab(torch.mul(p_s, difference, out=log_t), group)
        difference.sub_(kl[:, None]).mul_(p_s)
        return kl
    p_t = torch.exp(log_t, out=work)
    difference = torch.sub(log_t, log_s, out=log_t)
    kl = _sum_over_vocab(difference.mul_(p_t), group)
    log_s.exp_().sub_(p_t)
    return kl


def _cross_entropy_(log_s: Tensor, labels: Tensor, group) -> Tensor:
    """Cross-entropy per token [n]; its gradient with respect to the student's logits takes the place of log_s."""
    first = 0 if group is None else dist.get_rank(group) * log_s.shape[-1]
    local = labels - first
    here = (local >= 0) & (local < log_s.shape[-1])
    index = local.clamp(0, log_s.shape[-1] - 1)[:, None]  # [n, 1]
    cross_entropy = -(log_s.gather(1, index)[:, 0] * here)
    if group is not None:
        dist.all_reduce(cross_entropy, group=group)
    log_s.exp_().scatter_add_(1, index, -here[:, None].to(log_s.dtype))
    return cross_entropy


def _sum_over_vocab(x: Tensor, group) -> Tensor:
    """[n, v] -> [n], summed over all shards."""
    total = x.sum(-1)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
