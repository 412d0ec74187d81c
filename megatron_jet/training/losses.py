"""The distillation losses: feature MSE per layer, KL and cross-entropy on logits."""

import torch
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.training import LossConfig
from megatron_jet.training.vocab_parallel import LogitLoss

VARIANCE_FLOOR = 1e-6


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of the residual stream over the teacher's variance, summed over tokens.

    Each token is divided by the variance of its own teacher feature: that is the scale the next layer's RMSNorm takes
    away, tokens with huge activations do not drown the others, and the sum does not depend on how tokens are spread
    over micro-batches and ranks.

    Args:
        student: [s, b, h] after a layer; the sequence may be sharded.
        teacher: the same, without gradient.

    Returns:
        Scalar, fp32. Divide by the number of tokens in the global batch.
    """
    teacher = teacher.float()
    error = (student.float() - teacher).square().mean(-1)  # [s, b]
    variance = teacher.var(-1, unbiased=False).clamp_min(VARIANCE_FLOOR)  # [s, b]
    return (error / variance).sum()


def layer_weights(loss: LossConfig, num_layers: int) -> tuple[float, ...]:
    """Weight of each layer's feature loss; they sum to 1. Raises UserError when their number is wrong."""
    if loss.layer_weights is None:
        return (1.0 / num_layers,) * num_layers
    if len(loss.layer_weights) != num_layers:
        raise UserError(f"loss.layer_weights has {len(loss.layer_weights)} values, the model has {num_layers} layers")
    total = sum(loss.layer_weights)
    if total <= 0 or min(loss.layer_weights) < 0:
        raise UserError("loss.layer_weights: give non-negative weights, at least one above 0")
    return tuple(weight / total for weight in loss.layer_weights)


def logit_loss(loss: LossConfig) -> LogitLoss:
    """The part of the loss that is computed on logits."""
    return LogitLoss(
        kl=loss.kl,
        reverse=loss.kl_direction == "reverse",
        temperature=loss.temperature,
        cross_entropy=loss.cross_entropy,
    )


class AuxiliaryLoss(torch.autograd.Function):
    """Passes a hidden state on unchanged and feeds a loss into the backward pass at this point.

    A pipeline stage that is not the last one has no loss of its own to call backward on; this gives it one.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = torch.ones_like(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad_hidden: Tensor):
        return grad_hidden, ctx.loss_like
