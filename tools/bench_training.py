#!/usr/bin/env python3
"""Tokens per second and model FLOPs utilisation of one training step, by mixer, through the trainer's own step."""

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / shelf) for shelf in (".", "kernels")]

from megatron_jet.configs.command_line import output_file, positive, run_tool  # noqa: E402
from megatron_jet.configs.errors import UserError  # noqa: E402
from megatron_jet.configs.files import write_json  # noqa: E402
from megatron_jet.configs.recipes.catalog import RECIPES, load_recipe  # noqa: E402

EXAMPLES = f"""examples:
  python tools/bench_training.py tiny
  python tools/bench_training.py jet_nemotron_2b --stage stage1 --mixers jet,gated_delta_net,attn --micro-batch 4
  torchrun --nproc-per-node 8 tools/bench_training.py jet_nemotron_2b --output training.json

RECIPE gives the teacher, mixers, losses, what trains and the layout ({", ".join(RECIPES)}, package.module:function or a
config.yaml). Weights and tokens are random; nothing is loaded. `attn` is the teacher's own architecture.
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; a bad one prints the usage and exits 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe or config.yaml")
    parser.add_argument("--stage", choices=("stage1", "stage2"), default="stage1", help="whose training (stage1)")
    parser.add_argument("--mixers", metavar="A,B", help="linear mixers of the recipe, and attn (default: all)")
    parser.add_argument("--micro-batch", type=positive, metavar="N", help="sequences per forward (the recipe's)")
    parser.add_argument(
        "--batch",
        type=positive,
        metavar="N",
        help="sequences per step and data-parallel rank (default: one micro-batch)",
    )
    parser.add_argument("--seq-length", type=positive, metavar="N", help="tokens (the recipe's)")
    parser.add_argument("--layers", type=positive, metavar="N", help="only this many layers, on small machines")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="(the recipe's)")
    parser.add_argument("--iterations", type=positive, default=10, metavar="N", help="steps of each mixer (10)")
    parser.add_argument("--drop", type=int, default=3, metavar="N", help="first steps that do not count (3)")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="of one device, for the utilisation (default: a measured matrix product)",
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    if not 0 <= options.drop < options.iterations:
        parser.error(f"--drop {options.drop} of {options.iterations} steps leaves none")
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        parser.error(f"--peak-tflops {options.peak_tflops} is not above 0")
    return options


def table(result):
    """The result for a terminal."""
    from rich.table import Table

    settings = result["settings"]
    title = (
        f"{result['device']['name']} x {settings['world_size']}, {settings['dtype']}, {settings['stage']} of "
        f"{settings['recipe']}: {settings['seq_length']} tokens x {settings['global_batch_size']} sequences per step"
    )
    grid = Table(title=title, title_justify="left")
    for column in ("mixer", "layers", "parameters", "trained", "ms/step", "tokens/s", "TFLOP/s", "of peak", "memory"):
        grid.add_column(column, justify="left" if column in ("mixer", "layers") else "right")
    for row in result["rows"]:
        found = row["measured"]
        grid.add_row(
            row["mixer"],
            " ".join(f"{count} {kind}" for kind, count in row["layers"].items()),
            f"{row['params'] / 1e6:,.2f}M",
            f"{row['trained_params'] / 1e6:,.2f}M",
            f"{found['milliseconds']:,.1f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['tflops']:,.3f}",
            f"{found['utilisation']:.1%}",
            f"{found['memory_mib']:,.0f} MiB" if "memory_mib" in found else "-",
        )
    return grid


def choose_mixers(config, text: str | None) -> list[str]:
    """The mixers asked for, or all of the recipe and the teacher's. Raises UserError for one that it does not have."""
    known = [*config.mixers, "attn"]
    wanted = text.split(",") if text else known
    for name in wanted:
        if name not in known:
            raise UserError(f"--mixers: '{name}' is not in the recipe; it has {', '.join(known)}")
    return wanted


def choose_teacher(config, layers: int | None):
    """The recipe's teacher, or its first layers."""
    from megatron_jet.configs.teacher_source import teacher_model

    teacher = teacher_model(config.teacher)
    if layers is None or layers >= teacher.num_layers:
        return teacher
    return teacher.replace(num_layers=layers, layer_plan=teacher.layer_plan[:layers])


def choose_training(config, options: argparse.Namespace, data_parallel: int):
    """The stage's training with the sizes asked for; by default one micro-batch per rank and step."""
    training = config.stage(options.stage).training
    micro = options.micro_batch or training.micro_batch_size
    return training.replace(
        steps=options.iterations,
        micro_batch_size=micro,
        global_batch_size=(options.batch or micro) * data_parallel,
        seq_length=options.seq_length or training.seq_length,
        loss=training.loss.replace(layer_weights=None),
    )


def measure(config, mixer: str, teacher, training, options: argparse.Namespace, peak: float, folder: Path):
    """One row: the student with this mixer. Collective."""
    import torch.distributed as dist

    from megatron_jet.configs.cost import model_cost
    from megatron_jet.configs.estimate import trainable_params, training_flops_per_token
    from megatron_jet.configs.run_estimate import planned_student
    from megatron_jet.training.bench import bench_job, time_steps

    student = planned_student(config, teacher)
    if mixer not in student.layer_plan:
        student = planned_student(config, teacher, mixer)
    model = teacher if mixer == "attn" else student
    if mixer not in model.layer_plan:
        raise UserError(f"--layers {options.layers}: the recipe's placement budgets leave no layer for {mixer}")
    dtype = options.dtype or config.dtype
    job = bench_job(mixer, model, teacher, training, config.parallel, dtype, folder / mixer)
    times = time_steps(job)
    seconds = statistics.median(times.seconds[options.drop :])
    tokens = training.global_batch_size * training.seq_length / seconds
    flops = (
        training_flops_per_token(model, teacher if job.distills else None, training) * tokens / dist.get_world_size()
    )
    return {
        "mixer": mixer,
        "layers": dict(Counter(entry.partition(":")[0] for entry in model.layer_plan)),
        "params": model_cost(model, 1).total_params,
        "trained_params": trainable_params(model, training.trainable),
        "measured": {
            "milliseconds": seconds * 1e3,
            "tokens_per_second": tokens,
            "tflops": flops / 1e12,
            "utilisation": flops / peak,
            **({} if times.memory_mib is None else {"memory_mib": times.memory_mib}),
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print. Returns the exit code."""
    options = parse_arguments(arguments)
    config = load_recipe(options.recipe)
    mixers = choose_mixers(config, options.mixers)
    teacher = choose_teacher(config, options.layers)
    # After the cheap checks: these import torch and Megatron.
    from megatron_jet.training import cpu_backend

    cpu_backend.install()
    import torch
    import torch.distributed as dist

    from megatron_jet.evaluation.device import find_device, measure_rates, record
    from megatron_jet.evaluation.throughput.models import DTYPES
    from megatron_jet.training.parallel import parallel_session

    with tempfile.TemporaryDirectory() as folder, parallel_session(config.parallel, seed=0):
        world = dist.get_world_size()
        training = choose_training(config, options, config.parallel.data_parallel(world))
        device = find_device(f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu")
        dtype = options.dtype or config.dtype
        rate = measure_rates(device, DTYPES[dtype]).flops_per_second
        peak = options.peak_tflops * 1e12 if options.peak_tflops else rate
        rows = [measure(config, mixer, teacher, training, options, peak, Path(folder)) for mixer in mixers]
        main_rank = dist.get_rank() == 0
    result = {
        **record("training", device),
        "settings": {
            "recipe": options.recipe,
            "stage": options.stage,
            "dtype": dtype,
            "world_size": world,
            "parallel": config.parallel.to_dict(),
            "seq_length": training.seq_length,
            "micro_batch_size": training.micro_batch_size,
            "global_batch_size": training.global_batch_size,
            "iterations": options.iterations,
            "dropped": options.drop,
            "loss": training.loss.to_dict(),
            "trainable": list(training.trainable),
            "peak_tflops": options.peak_tflops,
        },
        "rows": rows,
        "measured": {"flops_per_second": rate},
    }
    if not main_rank:
        return 0
    if options.output:
        write_json(options.output, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140).print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
