"""One training step of a model at any layout, as the trainer does it: Megatron's schedule, DDP, gradient finalisation.

Functions here run inside pool workers, or in the test process under the `single_rank` fixture.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.model.builder import build_model
from megatron_jet.model.features import collect_features
from megatron_jet.model.state import gather_tensors, load_tensors, unwrap
from megatron_jet.training.checkpoint import load_model, save_model


@dataclass
class Step:
    """Results of one step, in full, on rank 0: hidden[i] [b, s, h] is the residual stream after layer i."""

    loss: float | None = None
    logits: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    final_norm: Tensor | None = None
    grads: dict[str, Tensor] = field(default_factory=dict)


def packed(lengths: list[int]) -> PackedSeqParams:
    """Megatron's description of one row that holds sequences of these lengths."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))


def next_token_loss(logits: Tensor, tokens: Tensor, lengths: list[int] | None = None) -> Tensor:
    """Mean cross-entropy of the next token, inside each sequence of a packed row. logits [b, s, v], tokens [b, s]."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    if lengths is not None:
        labels = labels.clone()
        labels[0, torch.tensor(lengths).cumsum(0) - 1] = -100
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def train_step(
    model: ModelConfig,
    layout: ParallelConfig,
    tokens: Tensor,
    *,
    tensors: dict[str, Tensor] | None = None,
    load_from: str | None = None,
    save_to: str | None = None,
    lengths: list[int] | None = None,
    recompute: bool = False,
) -> Step | None:
    """Forward and backward of one micro-batch.

    Args:
        model, layout: what to build; `init_parallel` has run.
        tokens: [b, s]
        tensors: full weights by checkpoint key, or
        load_from: a checkpoint directory; without either, the initial weights.
        save_to: write the weights there first.
        lengths: of the sequences packed into the row.

    Returns:
        The results on rank 0, None elsewhere.
    """
    chunks = build_model(model, layout, recompute=recompute)
    if tensors is not None:
        load_tensors(chunks, tensors)
    if load_from is not None:
        load_model(chunks, load_from)
    if save_to is not None:
        save_model(chunks, save_to)
    wrapped = wrap(chunks)
    step = Step()
    forward = partial(_forward_step, step=step, tokens=tokens, lengths=lengths)
    with collect_features(wrapped) as features:
        hooks = [_keep_final_norm(chunk, step) for chunk in chunks if chunk.post_process]
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([None])] * len(wrapped) if len(wrapped) > 1 else iter([None]),
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=1 if len(wrapped) == 1 else layout.pipeline,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            decoder_seq_length=tokens.shape[1],
            forward_only=False,
        )
        step.hidden = {i: _full(hidden, layout) for i, hidden in features.items()}
    for hook in hooks:
        hook.remove()
    for chunk in wrapped:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.to(parameter.dtype)
    return _merge(step, gather_tensors(chunks), layout)


def wrap(chunks: list) -> list[DistributedDataParallel]:
    """DDP around every chunk, set up as the schedules expect it."""
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=True) for chunk in chunks]
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    return wrapped


def _forward_step(iterator, chunk, *, step: Step, tokens: Tensor, lengths: list[int] | None):
    packing = None if lengths is None else packed(lengths)
    output = chunk(tokens, None, None, packed_seq_params=packing)

    def loss_function(local_logits: Tensor):
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(local_logits)  # [b, s, vocab]
        loss = next_token_loss(logits, tokens, lengths)
        step.logits, step.loss = logits.detach(), loss.item()
        return loss, {}

    return output, loss_function


def _keep_final_norm(chunk, step: Step):
    def keep(module, inputs, output):
        step.final_norm = output

    return unwrap(chunk).decoder.final_layernorm.register_forward_hook(keep)


def _full(hidden: Tensor, layout: ParallelConfig) -> Tensor:
    """[s(/tp), b, h] -> [b, s, h]"""
    if layout.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
    return hidden.detach().transpose(0, 1)


def _merge(step: Step, grads: dict[str, Tensor] | None, layout: ParallelConfig) -> Step | None:
    """Bring the pieces of all pipeline stages to rank 0."""
    if step.final_norm is not None:
        step.final_norm = _full(step.final_norm, layout)
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, step if parallel_state.get_tensor_model_parallel_rank() == 0 else Step())
    if dist.get_rank() != 0:
        return None
    whole = Step(grads=grads)
    for part in parts:
        whole.hidden |= part.hidden
        if part.loss is not None:
            whole.loss, whole.logits, whole.final_norm = part.loss, part.logits, part.final_norm
    return whole


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((value - reference).norm() / reference.norm().clamp(min=1e-30)).item()
