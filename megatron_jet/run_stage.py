"""Worker: run stages of a run directory, alone or under torchrun or srun.

    python -m megatron_jet.run_stage RUN_DIR STAGE[:CANDIDATE] [STAGE...]

Exit codes: 0 done, 1 failed, 2 usage, 75 interrupted and worth running again.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from megatron_jet.configs.candidates import candidate_names, split_target
from megatron_jet.configs.checksums import verification
from megatron_jet.configs.environment import gpu_problem, trains_delta_rule
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.overrides import load_yaml
from megatron_jet.configs.run import RunConfig
from megatron_jet.configs.signals import SIGNALS, Interrupted, interruptible
from megatron_jet.configs.stages import STAGE_ORDER

EXIT_FAILED = 1
EXIT_INTERRUPTED = 75


def main(arguments: list[str] | None = None) -> int:
    """Run the stages named on the command line, in the order given."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_jet.run_stage",
        description="Run stages of a run directory (normally called by the launcher).",
        epilog="example: python -m megatron_jet.run_stage runs/tiny placement block_selection:jet",
    )
    parser.add_argument("run_dir", type=Path, help="directory with config.yaml")
    parser.add_argument("stages", nargs="+", metavar="STAGE[:CANDIDATE]", help=f"one of {', '.join(STAGE_ORDER)}")
    args = parser.parse_args(arguments)
    try:
        with interruptible():  # from here on: what follows imports for seconds
            targets = [split_target(stage) for stage in args.stages]
            config = RunConfig.parse(load_yaml(args.run_dir / "config.yaml"), str(args.run_dir / "config.yaml"))
            check_targets(config, targets)
            run_targets(args.run_dir.resolve(), config, targets)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def check_targets(config: RunConfig, targets: list[tuple[str, str | None]]) -> None:
    """Raise UserError for a stage or candidate that the run does not have. Their names become paths."""
    for stage, candidate in targets:
        config.stage(stage)
        known = candidate_names(config, stage)
        if candidate is not None and candidate not in known:
            listed = ", ".join(known) or "none"
            raise UserError(f"stage '{stage}' has no candidate '{candidate}'; known: {listed}")


def run_targets(run_dir: Path, config: RunConfig, targets: list[tuple[str, str | None]]) -> None:
    """Run stages and candidates one after the other in this process.

    Raises:
        UserError: bad input.
        Interrupted: stopped by a signal, with everything saved.
    """
    from megatron_jet.training import cpu_backend

    cpu_backend.install()  # before anything imports Megatron
    check_gpus()
    check_kernels(config, [stage for stage, _ in targets])
    from megatron_jet.postnas.pipeline import run_candidate, run_stage
    from megatron_jet.postnas.processes import world
    from megatron_jet.postnas.stage import StageContext
    from megatron_jet.postnas.stage_log import redirect_output
    from megatron_jet.postnas.writers import stacks_on_demand, stage_writer

    stacks_on_demand()
    ctx = StageContext(run_dir, config)
    with verification(config.verify_checkpoints), world():
        for stage, candidate in targets:
            directory = ctx.stage_dir(stage)
            redirect_output(directory if candidate is None else directory / "jobs" / candidate)
            with stage_writer(run_dir, stage, candidate, config.watchdog_seconds):
                if candidate is None:
                    run_stage(ctx, stage)
                else:
                    run_candidate(ctx, stage, candidate)


def check_gpus() -> None:
    """Raise UserError where a job was given GPUs (POSTNAS_GPUS) that torch does not see: it would train on the CPU."""
    import torch

    asked = os.environ.get("POSTNAS_GPUS", "")
    problem = gpu_problem(int(asked), torch.cuda.device_count(), torch.__version__) if asked.isdecimal() else None
    if problem:
        raise UserError(problem)


def check_kernels(config: RunConfig, stages: list[str]) -> None:
    """Raise UserError where stages of this run cannot train on this GPU. Some would find out after days only."""
    import torch

    from jet_kernels import dispatch

    if not torch.cuda.is_available() or not trains_delta_rule(config):
        return
    if not any(hasattr(config.stage(stage), "training") for stage in stages):
        return
    try:
        dispatch.check_training("chunk_gated_delta_rule", torch.device("cuda"))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None


def leave(code: int) -> NoReturn:
    """Exit. What was decided is not changed by a signal while the libraries are taken down."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
