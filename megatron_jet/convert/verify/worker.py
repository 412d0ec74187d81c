"""The Megatron side of `verify`, one rank of it. Imports Megatron only once CPU support is in place."""

import os
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.model import ModelConfig
from megatron_jet.configs.training import ParallelConfig
from megatron_jet.training import cpu_backend


@dataclass(frozen=True)
class VerifyJob:
    """What to run. `out` is a directory for the rendezvous and for what every rank finds."""

    checkpoint: str
    model: ModelConfig
    parallel: ParallelConfig
    tokens: Tensor  # [b, s]
    out: str


def run(rank: int, job: VerifyJob) -> None:
    """Write what this rank holds of the layer outputs and logits to a file in `<out>`."""
    cpu_backend.install()
    import torch.distributed as dist

    from megatron_jet.training.parallel import destroy_parallel, init_parallel

    world_size = job.parallel.tensor * job.parallel.pipeline
    if world_size > 1:
        os.environ["LOCAL_RANK"] = str(rank)
    init_parallel(
        job.parallel, 0, store=dist.FileStore(f"{job.out}/store", world_size), rank=rank, world_size=world_size
    )
    try:
        write_activations(job)
    except UserError as error:
        if world_size == 1:
            raise
        raise UserError(str(error)) from None  # of several processes the caller gets the text, told by this type's name
    finally:
        destroy_parallel()


def write_activations(job: VerifyJob) -> None:
    """This rank's part of the job, with its layout already in place."""
    from megatron.core import parallel_state, tensor_parallel

    from megatron_jet.model.builder import build_model
    from megatron_jet.model.features import collect_features
    from megatron_jet.training.checkpoint import load_model

    chunks = build_model(job.model, job.parallel, dtype="fp32", init_seed=None)
    load_model(chunks, job.checkpoint)
    with torch.no_grad(), collect_features(chunks) as features:
        logits = _forward(chunks[0].eval(), job)
    tensors = {str(layer): hidden.transpose(0, 1) for layer, hidden in features.items()}  # [b, s, h]
    if logits is not None:
        tensors["logits"] = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        save_file({k: v.float().cpu().contiguous() for k, v in tensors.items()}, f"{job.out}/{stage}.safetensors")


def _forward(chunk: torch.nn.Module, job: VerifyJob) -> Tensor | None:
    """One forward through all pipeline stages. Logits [b, s, vocab / tp] on the last one, None on the others."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    device = next(chunk.parameters()).device
    tokens = job.tokens.to(device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    if not chunk.pre_process:
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], job.model.hidden_size, device=device)  # [s, b, h]
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        chunk.set_input_tensor(hidden)
    output = chunk(tokens, positions, None)
    if chunk.post_process:
        return output
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None
