"""One configuration for every kernel that Triton would tune. Correctness does not depend on it, and tuning takes long:
fla's kernels have up to 60 configurations per size, compiled one after the other, 925 for one dtype of kernel_cases.py.
"""


def install() -> None:
    """From here on, no kernel of this process is timed."""
    from triton.runtime import autotuner

    autotuner.Autotuner.run = run_one


def choose(configs: list, tile: int = 0):
    """The smallest tiles, and two warps: few registers, little shared memory, runs on every GPU. A key tile of 128
    that the caller fixes needs four, or thousands of registers are spilled."""
    warps = 4 if tile >= 128 else 2
    return min(configs, key=lambda config: (abs(config.num_warps - warps), sorted(config.kwargs.items())))


def run_one(tuner, *args, **options):
    """Takes the place of `Autotuner.run`."""
    tuner.nargs = dict(zip(tuner.arg_names, args))
    config = choose(tuner.prune_configs(options) if len(tuner.configs) > 1 else tuner.configs, options.get("BK", 0))
    tuner.best_config = config
    if config.pre_hook is not None:
        config.pre_hook({**tuner.nargs, **options, **config.all_kwargs()})
    try:
        return tuner.fn.run(*args, **options, **config.all_kwargs())
    finally:
        tuner.nargs = None
