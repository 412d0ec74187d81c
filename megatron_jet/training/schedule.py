"""Learning-rate schedules as plain functions of the step: nothing to save, nothing to restore."""

import math

from megatron_jet.configs.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step.

    Linear warm-up over `warmup_steps`, then cosine decay to lr * min_lr_ratio, or constant, or constant with a linear
    decay over the last `decay_fraction` of the steps (warm-up, stable, decay).

    Args:
        config: the schedule.
        step: 0-based optimiser step.
        total_steps: of the run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = max(1, round(config.decay_fraction * total_steps))
    remaining = (total_steps - step) / decay_steps
    return floor + (config.lr - floor) * min(1.0, max(0.0, remaining))
