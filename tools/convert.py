#!/usr/bin/env python3
"""Hugging Face <-> Megatron checkpoints. Thin: the work is in megatron_jet/convert."""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / shelf) for shelf in (".", "kernels")]

from megatron_jet.configs.command_line import run_tool  # noqa: E402
from megatron_jet.configs.signals import stop_on_signals  # noqa: E402

EPILOG = """examples:
  python tools/convert.py import models/Qwen2.5-1.5B checkpoints/teacher
  python tools/convert.py import SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2
  python tools/convert.py export runs/tiny/prepared/teacher exported --dtype bf16
  python tools/convert.py verify models/Qwen2.5-1.5B checkpoints/teacher --tp 2
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line: import, export and verify."""
    parser = argparse.ArgumentParser(
        prog="tools/convert.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|verify")
    keep = {"epilog": EPILOG, "formatter_class": argparse.RawTextHelpFormatter}

    imports = commands.add_parser("import", help="Hugging Face directory or GGUF file to Megatron checkpoint", **keep)
    imports.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="or a .gguf file")
    imports.add_argument("out", type=Path, metavar="OUT")

    export = commands.add_parser("export", help="Megatron checkpoint to Hugging Face directory", **keep)
    export.add_argument("checkpoint", type=Path, metavar="CKPT")
    export.add_argument("out", type=Path, metavar="OUT_HF_DIR")
    export.add_argument("--dtype", choices=("stored", "fp32", "bf16"), default="stored", help="type of the weights")
    export.add_argument("--tokenizer", type=Path, help="directory with the tokenizer's files to put beside the weights")
    export.add_argument("--shard-bytes", type=int, default=4 << 30, help="size of one safetensors file")

    for command in (imports, export):
        command.add_argument("--force", action="store_true", help="replace an existing output")

    verify = commands.add_parser("verify", help="compare logits of both, layer by layer", **keep)
    verify.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    verify.add_argument("checkpoint", type=Path, metavar="CKPT")
    verify.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the Megatron model")
    verify.add_argument("--pp", type=int, default=1, help="pipeline-parallel size of the Megatron model")
    verify.add_argument(
        "--tolerance", type=tolerance, default=1e-4, help="relative difference that still counts as equal"
    )
    verify.add_argument("--json", action="store_true", help="print the comparison as JSON")
    return parser


def tolerance(text: str) -> float:
    """A relative difference. Raises ArgumentTypeError when nothing, or everything, would be within it."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of 0 or more")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Convert or compare. Returns the exit code; what a user can repair is one line on stderr."""
    return run_tool(lambda: work(arguments), interrupted="interrupted; nothing was written")


def work(arguments: list[str] | None) -> int:
    """What the command line asks for."""
    given = sys.argv[1:] if arguments is None else arguments
    args = build_parser().parse_args(given)
    args.shown = shlex.join(["python", "tools/convert.py", *given])
    # After the cheap checks: these import torch, Megatron and transformers.
    from megatron_jet.training import cpu_backend

    cpu_backend.install()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return {"import": run_import, "export": run_export, "verify": run_verify}[args.command](args)


def run_import(args: argparse.Namespace) -> int:
    """`import`; returns the exit code."""
    from megatron_jet.convert.hf_import import import_hf
    from megatron_jet.convert.progress import ConversionProgress

    with ConversionProgress() as progress:
        model = import_hf(args.hf_dir, args.out, force=args.force, progress=progress)
    print(f"imported {args.hf_dir} ({model.num_layers} layers: {summary(model)}) into {args.out}")
    print(progress.summary())
    return 0


def run_export(args: argparse.Namespace) -> int:
    """`export`; returns the exit code."""
    from megatron_jet.convert.hf_export import export_hf
    from megatron_jet.convert.progress import ConversionProgress

    with ConversionProgress() as progress:
        model = export_hf(
            args.checkpoint,
            args.out,
            dtype=args.dtype,
            shard_bytes=args.shard_bytes,
            force=args.force,
            companions=args.tokenizer,
            command=args.shown,
            progress=progress,
        )
    print(f"exported {args.checkpoint} ({model.num_layers} layers: {summary(model)}) to {args.out}")
    print(progress.summary())
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """`verify`; returns the exit code: 1 when the models differ."""
    from megatron_jet.configs.training import ParallelConfig
    from megatron_jet.convert.verify.compare import first_different, verify

    layout = ParallelConfig.parse({"tensor": args.tp, "pipeline": args.pp}, "--tp, --pp")
    rows = verify(args.hf_dir, args.checkpoint, layout)
    different = first_different(rows, args.tolerance)
    if args.json:
        plain = [row.__dict__ for row in rows]
        print(json.dumps({"rows": plain, "first_different": different and different.name}))
    else:
        for row in rows:
            print(f"{row.name:12} relative {row.ratio:.2e}  largest {row.largest:.2e}")
    if different is not None:
        print(f"error: {different.name} differs first (relative {different.ratio:.2e})", file=sys.stderr)
        return 1
    if not args.json:
        print("equal")
    return 0


def summary(model) -> str:
    """How many layers a model has of each mixer: "4 jet, 2 attn"."""
    kinds = [entry.partition(":")[0] for entry in model.layer_plan]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
