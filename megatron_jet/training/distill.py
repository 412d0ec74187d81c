"""A student and, frozen beside it, its teacher: one module for Megatron's pipeline schedules."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_jet.configs.training import LossConfig
from megatron_jet.model.features import collect_features
from megatron_jet.training.freezing import named_parameters
from megatron_jet.training.losses import AuxiliaryLoss, feature_loss, layer_weights, logit_loss
from megatron_jet.training.vocab_parallel import logit_losses

FEATURE, KL, CROSS_ENTROPY = range(3)
TERMS = ("feature", "kl", "cross_entropy")


@dataclass
class Normalizer:
    """Token counts of the global batch. Losses are divided by them at once, so gradients are summed everywhere.

    Attributes:
        tokens: all tokens, for features: later positions read all of them.
        scored: tokens whose loss mask is set, for the losses on logits.
    """

    tokens: float
    scored: float


class DistillationModel(nn.Module):
    """One model chunk of the student with the teacher's chunk of the same layers.

    On the last pipeline stage `forward` gives the loss. On the others it gives the hidden state for the next stage,
    with the feature losses of this stage hooked into its backward pass. With a teacher, both hidden states travel
    together, stacked on the batch dimension: [s(/tp), 2b, h], the student first.

    The teacher is not a submodule: it must not show up among parameters, in checkpoints or in gradient buffers.

    Args:
        student: chunk that trains.
        teacher: chunk with the same layers, or None without a teacher.
        loss: the terms and their weights.
        num_layers: of the whole model.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, loss: LossConfig, num_layers: int):
        super().__init__()
        self.module = student  # Megatron looks attributes such as pre_process up through `.module`
        self._teacher = (teacher,)
        self.logit_loss = logit_loss(loss)
        self.needs_logits = loss.needs_logits
        self.feature_weight = loss.feature
        self.layer_weights = layer_weights(loss, num_layers)
        group = parallel_state.get_tensor_model_parallel_group()
        self.tp_group = group if group.size() > 1 else None
        self.terms = torch.zeros(len(TERMS), device=torch.cuda.current_device())
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def take_terms(self) -> Tensor:
        """This rank's share of feature, KL and cross-entropy since the last call [3]; sum it over all ranks."""
        # Tensor-parallel ranks hold copies of these values, but for features of a sharded sequence.
        copies = 1 if self.tp_group is None else self.tp_group.size()
        share = self.terms / copies
        if self.module.config.sequence_parallel:
            share[FEATURE] = self.terms[FEATURE]
        self.terms = torch.zeros_like(self.terms)
        return share

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called by the schedule with what the previous stage sent (None on the first)."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if received is None or self.teacher is None:
            self.module.set_input_tensor(received)
            return
        student, teacher = received.chunk(2, dim=1)
        self.module.set_input_tensor(student.contiguous())
        self.teacher.set_input_tensor(teacher.detach().contiguous())

    def forward(self, batch: dict[str, Tensor], norm: Normalizer) -> Tensor:
        """Run both models on one micro-batch.

        Args:
            batch: tokens, labels [b, s] and loss_mask [b, s].
            norm: token counts of the global batch.

        Returns:
            The loss (last stage), or the hidden state(s) for the next stage.
        """
        positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device)
        positions = positions.expand_as(batch["tokens"])
        target = target_features = None
        if self.teacher is not None:
            with torch.no_grad(), self._features(self.teacher) as target_features:
                target = self.teacher(batch["tokens"], positions, None, output_processor=_head(self.logit_loss.kl > 0))
        with self._features(self.module) as features:
            output = self.module(batch["tokens"], positions, None, output_processor=_head(self.needs_logits))
        feature = self._feature_loss(features, target_features, norm) if self.feature_weight else None
        if self.module.post_process:
            # Without a loss on logits, zero: the stages before still need a gradient, if no feature here gives one.
            loss = self._logit_losses(output, target, batch, norm) if self.needs_logits else 0.0 * output[:1].sum()
            return loss if feature is None else loss + self.feature_weight * feature
        if feature is not None and torch.is_grad_enabled():
            output = AuxiliaryLoss.apply(output, self.feature_weight * feature)
        return output if target is None else torch.cat([output, target], dim=1)

    def _features(self, model: nn.Module):
        """Features are collected where there is something to compare them with."""
        return collect_features([model]) if self.feature_weight else nullcontext()

    def _feature_loss(self, features, targets, norm: Normalizer) -> Tensor:
        total = torch.zeros_like(self.terms[FEATURE])
        for layer in features:
            if self.layer_weights[layer]:
                total = total + self.layer_weights[layer] * feature_loss(features[layer], targets[layer])
        total = total / norm.tokens
        self.terms[FEATURE] += total.detach()
        return total

    def _logit_losses(
        self, logits: Tensor, target: Tensor | None, batch: dict[str, Tensor], norm: Normalizer
    ) -> Tensor:
        """logits, target [s, b, vocab / tp] -> scalar."""
        weights = batch["loss_mask"].mT.flatten().float() / norm.scored
        has_target = target is not None and self.logit_loss.kl > 0
        loss, sums = logit_losses(
            logits.flatten(0, 1),
            target.flatten(0, 1) if has_target else None,
            batch["labels"].mT.flatten(),
            weights,
            self.logit_loss,
            self.tp_group,
        )
        self.terms[KL:] += sums
        return loss


def _head(wanted: bool) -> Callable[..., Tensor]:
    """What the last stage of a model does with its last hidden state [s(/tp), b, h].

    Megatron's own way would turn the logits around to [b, s, vocab / tp], a copy of the largest tensor there is.
    """

    def logits(*, hidden_states: Tensor, output_layer: nn.Module, output_weight: Tensor | None, **_) -> Tensor:
        return output_layer(hidden_states, weight=output_weight)[0]  # [s, b, vocab / tp]

    def nothing(*, hidden_states: Tensor, **_) -> Tensor:
        return hidden_states

    return logits if wanted else nothing


@torch.no_grad()
def share_frozen_tensors(students: list[nn.Module], teachers: list[nn.Module]) -> int:
    """Let the teacher use the student's storage where a frozen tensor of both is equal: one copy instead of two.

    A supernet's softmax paths are compared with the teacher's softmax layers.

    Returns:
        Bytes saved on this rank.
    """
    frozen = {
        name.replace(".paths.attn.", "."): parameter
        for name, parameter in named_parameters(students)
        if not parameter.requires_grad
    }
    saved = 0
    for name, parameter in named_parameters(teachers):
        twin = frozen.get(name)
        if twin is not None and twin.shape == parameter.shape and torch.equal(twin, parameter):
            saved += parameter.nbytes
            parameter.data = twin.data
    return saved
