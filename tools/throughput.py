#!/usr/bin/env python3
"""Prefill and generation speed of a model, or of two side by side, by the paper's protocol, beside their rooflines."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / shelf) for shelf in (".", "kernels")]

from megatron_jet.configs.command_line import lengths, output_file, positive, run_tool  # noqa: E402
from megatron_jet.configs.files import write_json  # noqa: E402
from megatron_jet.configs.recipes.known_models import KNOWN_MODELS  # noqa: E402

EXAMPLES = f"""examples:
  python tools/throughput.py runs/tiny/export --against megatron_jet/teachers/tiny --contexts 1024,4096
  python tools/throughput.py --random-weights Jet-Nemotron-2B --against Qwen3-1.7B --beyond-positions \\
      --output jet_2b.json --plot jet_2b.svg

A directory is loaded. A config.json, or the name of a published model, gets random weights, which run equally fast:
{", ".join(KNOWN_MODELS)}.
"""
GPU_CONTEXTS = "4096,8192,16384,32768,65536,131072,262144"
CPU_CONTEXTS = "1024,2048,4096"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; a bad one prints the usage and exits 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_dir", metavar="HF_DIR", nargs="?", help="model directory with config and safetensors")
    parser.add_argument("--random-weights", metavar="CONFIG", help="instead of HF_DIR: config.json or published name")
    parser.add_argument("--against", metavar="MODEL", help="second model: directory, config.json or published name")
    parser.add_argument("--contexts", type=lengths, metavar="A,B", help=f"tokens ({GPU_CONTEXTS}; CPU {CPU_CONTEXTS})")
    parser.add_argument("--new-tokens", type=positive, default=128, metavar="N", help="generated per sequence (128)")
    parser.add_argument("--iterations", type=positive, default=10, metavar="N", help="of each model and context (10)")
    parser.add_argument("--drop", type=int, default=3, metavar="N", help="first iterations that do not count (3)")
    parser.add_argument(
        "--batch-size", metavar="N", help="sequences, or 'search': the largest batch that fits (GPU: search, CPU: 4)"
    )
    parser.add_argument("--max-batch", type=positive, default=1024, metavar="N", help="limit of that search (1024)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="memory that the search may fill")
    parser.add_argument("--prefill-chunk", type=positive, metavar="N", help="tokens (default: by batch and device)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (GPU: bf16, CPU: fp32)")
    parser.add_argument("--decode", choices=("auto", "eager", "graph"), default="auto", help="auto: graphs on a GPU")
    parser.add_argument(
        "--attention",
        choices=("auto", "sdpa", "flash_attention_2", "eager"),
        default="auto",
        help="auto: flash attention on a GPU where flash-attn is installed, else SDPA",
    )
    parser.add_argument("--beyond-positions", action="store_true", help="allow contexts longer than the model's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="JSON, written after every context")
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="draw it, as .svg, .png or .pdf")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options = parser.parse_args(arguments)
    if (options.hf_dir is None) == (options.random_weights is None):
        parser.error("give either HF_DIR or --random-weights CONFIG")
    if not 0 <= options.drop < options.iterations:
        parser.error(f"--drop {options.drop} of {options.iterations} iterations leaves none")
    if options.plot and Path(options.plot).suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--plot {options.plot}: give a name that ends in .svg, .png or .pdf")
    if options.batch_size not in (None, "search"):
        try:
            options.batch_size = positive(options.batch_size)
        except (ValueError, argparse.ArgumentTypeError):
            parser.error(f"--batch-size {options.batch_size}: give a number above 0 or 'search'")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print. Returns the exit code."""
    options = parse_arguments(arguments)
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # progress bars would fill a log
    # After the cheap checks: these import torch and transformers.
    from megatron_jet.evaluation.device import find_device, limit_memory, measure_rates, record
    from megatron_jet.evaluation.throughput.comparison import Protocol, compare
    from megatron_jet.evaluation.throughput.models import DTYPES, open_subjects
    from megatron_jet.evaluation.throughput.table import table

    device = find_device(options.device)
    on_gpu = device.type == "cuda"
    batch = options.batch_size or ("search" if on_gpu else 4)
    protocol = Protocol(
        contexts=tuple(dict.fromkeys(options.contexts or lengths(GPU_CONTEXTS if on_gpu else CPU_CONTEXTS))),
        new_tokens=options.new_tokens,
        iterations=options.iterations,
        dropped=options.drop,
        batch_size=None if batch == "search" else batch,
        max_batch=options.max_batch,
        prefill_chunk=options.prefill_chunk,
        dtype=options.dtype or ("bf16" if on_gpu else "fp32"),
        decode=options.decode,
        memory_limit=limit_memory(options.memory_limit, device),
    )
    protocol.check(device)
    subjects = open_subjects(
        [options.hf_dir or options.random_weights, *([options.against] if options.against else [])],
        dtype=protocol.dtype,
        attention=options.attention,
        device=device,
        longest=max(protocol.contexts) + protocol.new_tokens,
        beyond_positions=options.beyond_positions,
    )
    result = compare(
        subjects,
        protocol,
        device,
        measure_rates(device, DTYPES[protocol.dtype]),
        record("throughput", device),
        say=lambda line: print(line, file=sys.stderr, flush=True),
        keep=lambda part: write_json(options.output, part.to_dict()) if options.output else None,
    )
    if options.plot:
        from megatron_jet.evaluation.throughput.plot import plot

        plot(result, options.plot)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 140).print(table(result))
    return 0 if result.rows else 1


if __name__ == "__main__":
    sys.exit(run_tool(main))
