"""Which of the optimiser's tensors belongs to which parameter. Megatron loses track of it in two places.

A bf16 model has fp32 parameters (A_log of the gated delta rule). Megatron's two mixed-precision optimisers keep both
kinds in one group and then look a parameter's state up in an order that holds only where a group is of one kind.
And what it gathers for a checkpoint is cut up by offsets that count the padding between buckets, which it left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor, nn


def index_by_main_order(optimizer: MegatronOptimizer) -> None:
    """Mend the distributed optimiser's index from parameters to its tensors. Once, before anything reads the index.

    It puts the fp32 shards of a group before the copies of bf16 ones, but numbers parameters as they lie in the
    gradient buffers. Every state it saves, loads or looks up goes through this index.
    """
    if not isinstance(optimizer, DistributedOptimizer):
        return
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    index = {
        parameter: (group, order)
        for group, (full, half) in enumerate(groups)
        for order, parameter in enumerate([*full, *half])
    }
    assert index.keys() == optimizer.model_param_group_index_map.keys(), "every parameter has one place"
    optimizer.model_param_group_index_map = index


def keep_bucket_padding(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimiser's state dicts hold the padding at the end of each bucket.

    The offsets by which they cut the gathered states into parameters count it. Without it, every parameter behind the
    first bucket would be saved with a part of the next one's state: with gradients reduced in buckets (`overlap`), and
    for a tied embedding, which has a bucket of its own in a pipeline.
    """
    if not isinstance(optimizer, DistributedOptimizer):
        return
    for buffer in optimizer.buffers:
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


@contextmanager
def paired_in_group_order(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside, the state dicts of the optimiser that is not distributed address the right parameters.

    They number the tensors of all groups through, and take the lists of bf16 parameters to be numbered alike. So the
    lists are given every parameter in the groups' order; an fp32 one is its own main copy.
    """
    if not isinstance(optimizer, Float16OptimizerWithFloat16Params):
        yield
        return
    before = optimizer.float16_groups, optimizer.fp32_from_float16_groups
    parameter_of = {main: parameter for parameter, main in main_tensors(optimizer).items()}
    mains = [list(group["params"]) for group in optimizer.optimizer.param_groups]
    optimizer.fp32_from_float16_groups = mains
    optimizer.float16_groups = [[parameter_of[main] for main in group] for group in mains]
    try:
        yield
    finally:
        optimizer.float16_groups, optimizer.fp32_from_float16_groups = before


def main_tensors(optimizer: MegatronOptimizer) -> dict[nn.Parameter, Tensor]:
    """Model parameter -> the tensor that the inner optimiser updates for it on this rank.

    Of a DistributedOptimizer after `index_by_main_order`.
    """
    if isinstance(optimizer, DistributedOptimizer):
        groups = optimizer.optimizer.param_groups
        index = getattr(optimizer, "model_param_group_index_map", {})
        return {parameter: groups[group]["params"][order] for parameter, (group, order) in index.items()}
    if isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = [
            *zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            *zip(optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ]
        return {parameter: main for models, mains in pairs for parameter, main in zip(models, mains)}
    return {parameter: parameter for parameter in optimizer.get_parameters()}
