#!/usr/bin/env python3
"""Tokenise text, jsonl and parquet into webdataset shards with an index."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_jet.configs.command_line import run_tool  # noqa: E402

EXAMPLE = """example:
  python tools/prepare_data.py corpus/ questions.jsonl data/prepared --tokenizer models/Qwen2.5-1.5B
  python tools/prepare_data.py web=crawl/ math=papers/ code=repos/ data/prepared --tokenizer models/Qwen2.5-1.5B
  python tools/prepare_data.py data/tiny --tokenizer megatron_jet/teachers/tiny --stdlib --synthetic recall,choice,copy

jsonl lines are {"text": ...} or {"prompt": ..., "answer": ...}; of the latter only the answer counts as a target.
NAME=PATH makes a source of that name (and NAME_qa of lines with answers), which recipes blend by name; without a
name the sources are text and qa.
Samples with answers are never cut, so take --seq-length no longer than training.seq_length of the recipe.
Documents go to train (90%), search and heldout (5% each) by a hash of their path and line."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "input files and folders, plain or as NAME=PATH, then the output"
    parser.add_argument("paths", nargs="+", metavar="INPUT... OUT_DIR", help=about)
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="HF_DIR")
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help="tokens of evaluation sequences; longer samples with answers are left out (4096; with --stdlib or "
        "--synthetic 256, the length of those samples, too)",
    )
    parser.add_argument("--stdlib", action="store_true", help="add the Python standard library's source")
    parser.add_argument("--synthetic", default="", metavar="TASKS", help="comma-separated: recall, choice, copy")
    parser.add_argument("--synthetic-samples", type=int, default=4000, metavar="N", help="training samples per task")
    parser.add_argument("--force", action="store_true", help="replace OUT_DIR")
    parser.add_argument("--json", action="store_true", help="print the index as JSON")
    args = parser.parse_args(argv)
    *inputs, out = args.paths
    tasks = tuple(filter(None, args.synthetic.split(",")))
    if not inputs and not args.stdlib and not tasks:
        parser.error("nothing to prepare: give an input before OUT_DIR, or --stdlib, or --synthetic")
    from megatron_jet.data.prepare import BUNDLED_SAMPLES, BUNDLED_TEXT_BYTES, Request, prepare

    own = args.stdlib or tasks
    request = Request(
        inputs=tuple(inputs),
        tokenizer=args.tokenizer,
        seq_length=args.seq_length if args.seq_length is not None else 256 if own else 4096,
        stdlib_bytes=BUNDLED_TEXT_BYTES if args.stdlib else None,
        synthetic=tasks,
        samples=BUNDLED_SAMPLES | {"train": args.synthetic_samples},
    )
    index = prepare(request, Path(out), force=args.force, say=lambda line: print(line, file=sys.stderr))
    if args.json:
        print(json.dumps(index.to_dict(), indent=2))
    else:
        for name, split in index.splits.items():
            counts = ", ".join(f"{source} {tokens:,}" for source, tokens in split.sources.items())
            print(f"{name}: {len(split.shards)} shards, tokens: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
