#!/usr/bin/env python3
"""Tokenise text, jsonl and parquet into webdataset shards with an index."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_jet.configs.command_line import run_tool  # noqa: E402
from megatron_jet.configs.signals import stop_on_signals  # noqa: E402

EXAMPLE = """example:
  python tools/prepare_data.py corpus/ questions.jsonl data/prepared --tokenizer models/Qwen2.5-1.5B
  python tools/prepare_data.py web=crawl/ math=papers/ code=repos/ data/prepared --tokenizer models/Qwen2.5-1.5B
  python tools/prepare_data.py data/tiny --tokenizer megatron_jet/teachers/tiny --stdlib --synthetic recall,choice,copy

jsonl lines are {"text": ...} or {"prompt": ..., "answer": ...}; of the latter only the answer counts as a target.
NAME=PATH makes a source of that name (and NAME_qa of lines with answers), which recipes blend by name; without a
name the sources are text and qa.
jsonl may be compressed: .jsonl.gz, .jsonl.zst, .json.gz and .json.zst are read as they are.
Samples with answers are never cut, so take --seq-length no longer than training.seq_length of the recipe.
Documents go to train (90%), search and heldout (5% each) by a hash of what they say.
A large corpus is prepared in parts, on several nodes or nights: --part 1/16 to --part 16/16, each into a directory of
its own, then tools/merge_data.py makes one of them."""


def part(text: str) -> tuple[int, int]:
    """argparse type: I/N."""
    number, _, parts = text.partition("/")
    return int(number), int(parts)


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
    about = "take every N-th input file, from the I-th; merge the parts with tools/merge_data.py"
    parser.add_argument("--part", type=part, metavar="I/N", help=about)
    about = "leave out, and count, documents that cannot be used; without it the first one ends the work"
    parser.add_argument("--skip-bad", action="store_true", help=about)
    parser.add_argument("--force", action="store_true", help="replace OUT_DIR")
    parser.add_argument("--json", action="store_true", help="print the index as JSON")
    args = parser.parse_args(argv)
    *inputs, out = args.paths
    tasks = tuple(filter(None, args.synthetic.split(",")))
    if not inputs and not args.stdlib and not tasks:
        parser.error("nothing to prepare: give an input before OUT_DIR, or --stdlib, or --synthetic")
    if args.part and (args.stdlib or tasks):
        parser.error(
            "--part divides input files; prepare --stdlib and --synthetic by themselves and merge them as well"
        )
    from megatron_jet.data.prepare import BUNDLED_SAMPLES, BUNDLED_TEXT_BYTES, Request, prepare
    from megatron_jet.data.progress import PreparationProgress

    own = args.stdlib or tasks
    request = Request(
        inputs=tuple(inputs),
        tokenizer=args.tokenizer,
        seq_length=args.seq_length if args.seq_length is not None else 256 if own else 4096,
        stdlib_bytes=BUNDLED_TEXT_BYTES if args.stdlib else None,
        synthetic=tasks,
        samples=BUNDLED_SAMPLES | {"train": args.synthetic_samples},
        part=args.part,
        skip_bad=args.skip_bad,
    )
    with PreparationProgress() as progress:
        index = prepare(request, Path(out), force=args.force, say=progress.say, watch=progress.update)
    progress.say(progress.summary())
    print(json.dumps(index.to_dict(), indent=2) if args.json else index.summary())
    return 0


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(run_tool(main))
