#!/usr/bin/env python3
"""Evaluate a Hugging Face directory with lm-evaluation-harness: its tasks, the paper's groups, and the tiny tasks."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / shelf) for shelf in (".", "kernels")]

from megatron_jet.configs.command_line import output_file, positive, run_tool  # noqa: E402
from megatron_jet.configs.files import write_json  # noqa: E402
from megatron_jet.evaluation.presets import PAPER_SCORES, PRESETS, find_preset  # noqa: E402

EXAMPLES = """examples:
  python tools/evaluate.py runs/tiny/export --tasks tiny --against runs/tiny/stages/evaluate/result.json
  python tools/evaluate.py Jet-Nemotron-2B --preset paper-mmlu paper-retrieval --against paper:jet_nemotron_2b
  python tools/evaluate.py my_model --tasks arc_easy,piqa --limit 100 --output result.json --json

Tasks and presets that are not this project's own download their data; for machines without a network, fetch it before
with tools/prefetch.py.
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; a bad one prints the usage and exits 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "hf_dir",
        metavar="HF_DIR",
        help="model directory with config, safetensors and tokenizer, or a Megatron checkpoint of one",
    )
    parser.add_argument("--tasks", metavar="A,B", default="", help="harness tasks; 'tiny' is all of this project's")
    parser.add_argument("--preset", nargs="+", metavar="NAME", default=[], help=f"the paper's: {', '.join(PRESETS)}")
    parser.add_argument("--data", metavar="DIR", help="prepared data of the tiny tasks (default: the run's)")
    parser.add_argument("--split", default="heldout", help="split of that data (heldout)")
    parser.add_argument("--sequences", type=positive, metavar="N", help="only N sequences of each tiny task")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="sequences per forward (8)")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="as saved: auto")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument(
        "--against",
        metavar="RESULT",
        help="compare with a file written here, with stages/evaluate/result.json of a run, or with the paper: "
        + ", ".join(f"paper:{name}" for name in PAPER_SCORES),
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="run modeling code that lies in HF_DIR")
    parser.add_argument("--allow-code", action="store_true", help="run programs the model writes, without a sandbox")
    options = parser.parse_args(arguments)
    options.tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not options.tasks and not options.preset:
        parser.error("give --tasks, --preset or both")
    return options


def data_directory(options: argparse.Namespace) -> str | None:
    """The data given, or that of the run whose export is evaluated."""
    beside = Path(options.hf_dir).resolve().parent / "prepared" / "data"
    if options.data is None and (beside / "index.json").is_file():
        return str(beside)
    return options.data


@contextmanager
def hf_directory(given: str) -> Iterator[str]:
    """The directory itself, or a temporary export of it when it is a checkpoint of this project."""
    if not (Path(given) / "model_config.json").is_file() or (Path(given) / "config.json").is_file():
        yield given
        return
    from megatron_jet.training.cpu_backend import install

    install()
    from megatron_jet.convert.hf_export import export_hf

    with tempfile.TemporaryDirectory() as folder:
        export_hf(given, Path(folder) / "export")
        yield str(Path(folder) / "export")


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, write, print. Returns the exit code."""
    options = parse_arguments(arguments)
    presets = [find_preset(name) for name in options.preset]
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # progress bars would fill a log
    # After the cheap checks: these import torch, transformers and the harness.
    from megatron_jet.evaluation.comparison import other_scores, table
    from megatron_jet.evaluation.device import find_device
    from megatron_jet.evaluation.harness import EvaluationOptions, evaluate

    find_device(options.device)  # before a checkpoint is exported for it
    other = other_scores(options.against) if options.against else None
    with hf_directory(options.hf_dir) as hf_dir:
        result = evaluate(
            hf_dir,
            options.tasks,
            presets,
            EvaluationOptions(
                data_dir=data_directory(options),
                split=options.split,
                sequences=options.sequences,
                limit=options.limit,
                batch_size=options.batch_size,
                dtype=options.dtype,
                device=options.device,
                trust_remote_code=options.trust_remote_code,
                allow_code=options.allow_code,
            ),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    result = result.replace(model=options.hf_dir)
    if options.output:
        write_json(options.output, result.to_dict())
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(table(result, options.against, other))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
