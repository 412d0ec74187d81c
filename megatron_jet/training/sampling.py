"""Supernet training: which path every layer takes in a step."""

import random
from dataclasses import dataclass

from megatron_jet.configs.errors import UserError


@dataclass(frozen=True)
class PathSampling:
    """Which layers run full attention in a step.

    Attributes:
        choices: paths of every layer, for example ("attn", "gla"). Layers with one path always take it.
        full_layers: weight of each number of full layers.
        seed: of the draws.
    """

    choices: tuple[tuple[str, ...], ...]
    full_layers: dict[int, float]
    seed: int

    def __post_init__(self):
        free = sum("attn" in paths and len(paths) > 1 for paths in self.choices)
        for count in self.full_layers:
            if not 0 <= count <= free:
                raise UserError(f"full_layers: {count} full layers asked for, but {free} layers have the choice")

    def draw(self, step: int) -> tuple[str, ...]:
        """The path of every layer in a step: equal on all ranks and after restarts, because only (seed, step) count."""
        generator = random.Random(f"{self.seed}:{step}")
        counts = sorted(self.full_layers)
        count = generator.choices(counts, [self.full_layers[n] for n in counts])[0]
        free = [i for i, paths in enumerate(self.choices) if "attn" in paths and len(paths) > 1]
        full = set(generator.sample(free, count))
        return tuple("attn" if i in full else linear_path(paths) for i, paths in enumerate(self.choices))

    def all_linear(self) -> tuple[str, ...]:
        """Every layer on its linear path: what validation looks at."""
        return tuple(linear_path(paths) for paths in self.choices)


def linear_path(paths: tuple[str, ...]) -> str:
    """The path that is not softmax attention; the only path where there is no choice."""
    linear = [path for path in paths if path != "attn" and not path.startswith("swa:")]
    return linear[0] if linear else paths[0]
