"""The residual stream after each layer, for distillation on every pipeline stage."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from megatron_jet.model.state import unwrap


@contextlib.contextmanager
def collect_features(chunks: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collect what this rank's layers put out during forwards inside the context.

    The tensors keep their gradient, also with recomputation. A later forward overwrites an earlier one's: take them
    before the next micro-batch.

    Yields:
        {global 0-based layer: residual stream [s(/tp with sequence parallelism), b, h] after that layer}, filled by
        every forward.
    """
    features: dict[int, Tensor] = {}

    def keep(layer: nn.Module, inputs: tuple, output: tuple[Tensor, None]) -> None:
        features[layer.layer_number - 1] = output[0]

    hooks = [layer.register_forward_hook(keep) for chunk in chunks for layer in unwrap(chunk).decoder.layers]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()
