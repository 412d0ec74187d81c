"""The placements that one found is compared with: evenly spaced ones, and no full attention at all."""

from megatron_jet.configs.layer_plan import uniform_phases, uniform_placement
from megatron_jet.configs.stages import PlacementConfig


def baselines(settings: PlacementConfig, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Full-attention layers (0-based) by name: `uniform`, declared in the config before anything is seen, the other
    even spacings as `uniform phase k`, and `all_linear`."""
    found = {"uniform": uniform_placement(num_layers, settings.budget, settings.uniform_phase)}
    for phase, placement in enumerate(uniform_phases(num_layers, settings.budget)):
        if placement != found["uniform"]:
            found[f"uniform phase {phase}"] = placement
    return found | {"all_linear": ()}


def compared_placements(settings: PlacementConfig, num_layers: int) -> tuple[str, ...]:
    """Names of those that `compare_training` trains, the one found first; none without such a training."""
    if settings.compare_training is None:
        return ()
    others = ("uniform",) if settings.comparison == "declared" else tuple(baselines(settings, num_layers))
    return ("learned", *others)
