"""Which parameters train: by fnmatch patterns on names that do not depend on the layout."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import nn

from megatron_jet.configs.errors import UserError
from megatron_jet.model.state import unwrap

LAYERS = "decoder.layers."


def named_parameters(chunks: list[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters under global names: layers are numbered from the start of the model, not of the stage."""
    for chunk in chunks:
        model = unwrap(chunk)
        for name, parameter in model.named_parameters():
            if name.startswith(LAYERS):
                local, _, rest = name.removeprefix(LAYERS).partition(".")
                name = f"{LAYERS}{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
            yield name, parameter


def trains(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a parameter trains: the last pattern that matches decides; `!pattern` freezes again."""
    decision = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            decision = not pattern.startswith("!")
    return decision


def freeze(chunks: list[nn.Module], patterns: tuple[str, ...]) -> None:
    """Set requires_grad by the patterns. Must run before gradient buffers and optimiser are made.

    What a mixer froze itself stays frozen: a static JetBlock's kernel generator takes no part in the forward pass.

    Raises:
        UserError: nothing is left to train, in the whole model or on one pipeline stage.
    """
    count = 0
    for name, parameter in named_parameters(chunks):
        parameter.requires_grad_(parameter.requires_grad and trains(name, patterns))
        count += parameter.requires_grad
    fewest = torch.tensor([count, -count], device=torch.cuda.current_device())
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    lowest, highest = fewest[0].item(), -fewest[1].item()
    if not highest:
        raise UserError(f"trainable: no parameter matches {list(patterns)}")
    if not lowest:
        raise UserError(f"trainable: {list(patterns)} leave a pipeline stage nothing to train; use fewer stages")
