#!/usr/bin/env python3
"""Milliseconds and bandwidth of every kernel, plain torch against Triton and flash-linear-attention, over shapes."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / shelf) for shelf in (".", "kernels")]

from megatron_jet.configs.command_line import output_file, run_tool  # noqa: E402
from megatron_jet.configs.errors import UserError  # noqa: E402
from megatron_jet.configs.files import write_json  # noqa: E402

EXAMPLES = """examples:
  python tools/bench_kernels.py
  python tools/bench_kernels.py --operations chunk_gated_delta_rule,fused_dynamic_conv --shapes 8x4096x12x96x256
  python tools/bench_kernels.py --dtype bf16 --output kernels.json

A shape is BxTxHxDKxDV: rows, tokens, heads, width of a key and of a value head. Operations that decode take one token.
What the device cannot run is a row that says so.
"""
# Jet-Nemotron-2B's and 4B's heads on a GPU; the tiny recipe's on a CPU.
GPU_SHAPES = "8x4096x12x96x256,2x16384x12x96x256,8x4096x16x128x256"
CPU_SHAPES = "4x512x4x24x48,1x2048x4x24x48"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; a bad one prints the usage and exits 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--shapes", metavar="A,B", help=f"BxTxHxDKxDV (GPU: {GPU_SHAPES}; CPU: {CPU_SHAPES})")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the inputs (GPU: bf16, CPU: fp32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(arguments)


def chosen_operations(text: str | None, known: list[str]) -> list[str]:
    """The operations asked for. Raises UserError for an unknown one."""
    wanted = text.split(",") if text else known
    for name in wanted:
        if name not in known:
            raise UserError(f"--operations: no operation '{name}'; known: {', '.join(known)}")
    return wanted


def table(result):
    """The result for a terminal."""
    from rich.table import Table

    device = f"{result.device['name']}, {result.settings['dtype']}"
    rate = result.measured["bytes_per_second"] / 1e9
    grid = Table(title=f"{device}: {rate:,.1f} GB/s measured", title_justify="left")
    for column in ("operation", "pass", "shape", "backend", "ms", "GB/s", "of bandwidth", "error"):
        grid.add_column(column, justify="left" if column in ("operation", "pass", "backend") else "right")
    for row in result.rows:
        found = row.measured
        cells = (
            ("[bold red]SKIPPED[/]", row.skipped, "", "")
            if row.skipped
            else (
                f"{found['milliseconds']:,.3f}",
                f"{found['bytes_per_second'] / 1e9:,.2f}",
                f"{found['share']:.1%}",
                "-" if row.error is None else f"{row.error:.1e}",
            )
        )
        grid.add_row(row.operation, row.passes, row.shape, row.backend, *cells)
    return grid


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print. Returns the exit code."""
    options = parse_arguments(arguments)
    os.environ.pop("JET_KERNELS", None)  # every implementation gets its turn here
    # After the cheap checks: these import torch.
    from megatron_jet.evaluation.device import find_device, measure_rates, record
    from megatron_jet.evaluation.kernel_bench import KernelResult, bench
    from megatron_jet.evaluation.kernel_cases import CASES, Shape
    from megatron_jet.evaluation.throughput.models import DTYPES

    device = find_device(options.device)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    operations = chosen_operations(options.operations, list(CASES))
    texts = (options.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)).split(",")
    shapes = [Shape.parse(text) for text in texts]
    rate = measure_rates(device, DTYPES[dtype]).bytes_per_second
    rows = []
    for row in bench(operations, shapes, device, DTYPES[dtype], rate):
        rows.append(row)
        found = f"SKIPPED: {row.skipped}" if row.skipped else f"{row.measured['milliseconds']:.3f} ms"
        print(f"{row.operation} {row.passes} {row.shape} {row.backend}: {found}", file=sys.stderr, flush=True)
    result = KernelResult(
        **record("kernels", device),
        settings={"dtype": dtype, "shapes": texts, "operations": operations},
        rows=rows,
        measured={"bytes_per_second": rate},
    )
    if options.output:
        write_json(options.output, result.to_dict())
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 160).print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
