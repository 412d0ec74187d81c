"""AdamW on Megatron's gradient buffers, with the distributed optimiser or without."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor, nn

from megatron_jet.configs.training import OptimizerConfig
from megatron_jet.training.main_tensors import (
    index_by_main_order,
    keep_bucket_padding,
    main_tensors,
    paired_in_group_order,
)


def wrap_data_parallel(
    chunks: list[nn.Module], *, distributed_optimizer: bool, overlap: bool = False, bucket_size: int | None = None
) -> list[DistributedDataParallel]:
    """Give the trainable parameters gradient buffers that are reduced over the data-parallel group.

    Losses are already divided by the token counts of the global batch, so gradients are summed, not averaged.

    Args:
        chunks: this rank's DistillationModels.
        distributed_optimizer: reduce to the shards that each rank updates.
        overlap: reduce a bucket of gradients as soon as the backward pass has all of them. Every trainable parameter
            must get a gradient in every step: not so for a supernet, nor above the last layer of a loss on features.
        bucket_size: parameters per bucket with `overlap`, on the first pipeline stage (the others have one bucket).
            None: 40 million, more on more than 40 ranks, as Megatron has it.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    bucket_size = bucket_size or max(40_000_000, 1_000_000 * ranks)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        bucket_size=bucket_size if overlap else None,
    )
    first_stage = parallel_state.get_pipeline_model_parallel_rank() == 0
    wrapped = []
    for i, chunk in enumerate(chunks):
        config = chunk.module.config
        config.calculate_per_token_loss = True
        size = bucket_size if overlap and first_stage and i == 0 else None
        layout = _buffer_layout(chunk, size, ranks, ddp_config) if distributed_optimizer else None
        wrapped.append(
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0, full_param_layout=layout)
        )
    config = chunks[0].module.config
    no_sync = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    config.finalize_model_grads_func = _finalize
    return wrapped


def _buffer_layout(chunk: nn.Module, bucket_size: int | None, ranks: int, ddp_config: DistributedDataParallelConfig):
    """Where each trainable parameter lies in the buffers that data-parallel ranks share out among them."""
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    return DistributedOptimizer.compute_full_param_layout(parameters, bucket_size, ranks, ddp_config)


def _finalize(model, num_tokens=None, **kwargs) -> None:
    """Sum gradients over ranks. The token count is left out: the losses were divided by it already."""
    finalize_model_grads(model, None, **kwargs)


def has_no_weight_decay(parameter: Tensor) -> bool:
    """Norm weights, biases, A_log and dt_bias: everything with one dimension."""
    return parameter.dim() <= 1


class Optimizer:
    """Clips, checks and applies one step. Gradients must be reduced already.

    Args:
        chunks: the wrapped model of this rank.
        config: optimiser settings.
        dtype: of the parameters; bf16 ones get fp32 main copies.
        distributed: shard the state over data-parallel ranks.
        undrawn: steps may leave parameters out, as a supernet's do. Then Adam is torch's, which counts steps for every
            parameter. The fused ones of Transformer Engine and Apex, otherwise taken where installed, count them for
            all together, and would correct the moments of a path for steps that it took no part in.
    """

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        config: OptimizerConfig,
        *,
        dtype: torch.dtype,
        distributed: bool,
        undrawn: bool = False,
    ):
        self.chunks = chunks
        self.config = config
        # The distributed optimiser's fp32 shards are views of the weights, and torch warns that they have gradients.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=distributed,
        )
        vectors = ParamKey(predicate=ParamPredicate("no_weight_decay", has_no_weight_decay))
        with _torch_adam() if undrawn else nullcontext():
            chained = get_megatron_optimizer(
                settings, chunks, config_overrides={vectors: ParamGroupOverride(wd_mult=0.0)}
            )
        (self.megatron,) = chained.chained_optimizers  # a second one exists for mixture-of-experts models only
        for group in self.megatron.param_groups:
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        index_by_main_order(self.megatron)
        keep_bucket_padding(self.megatron)
        prime_torch_adam(self.megatron)
        self._main_tensor = main_tensors(self.megatron)

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Bring the gradients to the optimiser's tensors, clip them, and return their global norm before clipping."""
        self.megatron.prepare_grads()
        return float(self.megatron.clip_grad_norm(self.config.clip_grad))

    @torch.no_grad()
    def apply(self, lr: float, undrawn: list[nn.Parameter] = ()) -> None:
        """Update the weights, after `gradient_norm`.

        Args:
            lr: learning rate of this step.
            undrawn: parameters that took no part in this step. Their gradient in the buffer is zero, which Adam would
                take for a gradient; without one it leaves weights, moments and step count alone.
        """
        for group in self.megatron.param_groups:
            group["lr"] = lr
        for parameter in undrawn:
            main = self._main_tensor.get(parameter)
            if main is not None:
                main.grad = None
        self.megatron.step_with_ready_grads()

    def sharded_state_dict(self, model_state: dict[str, Any], metadata: dict[str, Any], *, loading: bool = False):
        """Megatron's sharded state dict: main copies of the weights and Adam's moments. Collective.

        Args:
            model_state: the model's own, which says how each parameter is sharded.
            metadata: Megatron's choices of format.
            loading: it will be filled from a checkpoint.
        """
        with self._common_step(), paired_in_group_order(self.megatron):
            return self.megatron.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)

    @contextmanager
    def _common_step(self) -> Iterator[None]:
        """Inside, all of Adam's step counts are equal, which Megatron's state dicts take for granted.

        In a supernet they differ; train_state.py saves them one by one.
        """
        states = self._states_with_step()
        own = [state["step"] for state in states]
        highest = max((float(step) for step in own), default=0.0)
        for state in states:
            state["step"] = torch.tensor(highest)
        try:
            yield
        finally:
            for state, step in zip(states, own):
                state["step"] = step

    def load_state_dict(self, state: dict[str, Any], steps: dict[nn.Parameter, float | None]) -> None:
        """Take over what Megatron's `sharded_state_dict` of the optimiser gave when it was saved.

        torch's Adam keeps `step` per parameter, on any device, unless Transformer Engine or Apex is installed. The
        distributed optimiser's loader does not expect it there (KeyError), and gives all parameters one shared tensor,
        which Adam would advance once per parameter.

        Args:
            state: as loaded.
            steps: Adam's step counts by parameter. One that is not among them (the copy of a tied embedding on the last
                pipeline stage) gets the highest. Without effect where Adam keeps one count per group.
        """
        shards = state.pop("param_state", None)
        with paired_in_group_order(self.megatron):
            self.megatron.load_state_dict(state)
        states = self._states_with_step()
        common = [own.pop("step") for own in states]
        if shards is not None:
            self.megatron.load_parameter_state_from_fully_reshardable(shards)
        for own, step in zip(states, common):
            own["step"] = step.clone()
        for parameter, step in steps.items():
            own = self.state_of(parameter)
            if step is not None and torch.is_tensor(own.get("step")):
                own["step"].fill_(step)

    def _states_with_step(self) -> list[dict[str, Tensor]]:
        return [state for state in self.megatron.optimizer.state.values() if torch.is_tensor(state.get("step"))]

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Adam's state of a parameter (with the distributed optimiser, of this rank's shard); {} if none is here."""
        main = self._main_tensor.get(parameter)
        return {} if main is None else self.megatron.optimizer.state[main]


@contextmanager
def _torch_adam() -> Iterator[None]:
    """Inside, Megatron makes torch's AdamW even where Transformer Engine or Apex is installed. It has no setting."""
    before = megatron_optimizer.USING_PYTORCH_OPTIMIZER
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    try:
        yield
    finally:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = before


def prime_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Create Adam's state at once. torch makes it at a tensor's first gradient, which a path may not have met yet when
    the state is saved. Megatron does the same for the Adam of Apex and Transformer Engine."""
    inner = optimizer.optimizer
    if not isinstance(inner, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in inner.param_groups:
        for tensor in group["params"]:
            if not inner.state[tensor]:
                inner.state[tensor] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(tensor),
                    "exp_avg_sq": torch.zeros_like(tensor),
                }
