#!/usr/bin/env python3
"""Make one data directory out of several that tools/prepare_data.py made."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_jet.configs.command_line import run_tool  # noqa: E402
from megatron_jet.configs.signals import stop_on_signals  # noqa: E402

EXAMPLE = """example, four parts of one corpus and questions prepared by themselves:
  for i in 1 2 3 4; do
    python tools/prepare_data.py web=crawl/ parts/$i --part $i/4 --tokenizer models/Qwen2.5-1.5B
  done
  python tools/prepare_data.py retrieval=questions.jsonl parts/retrieval --tokenizer models/Qwen2.5-1.5B
  python tools/merge_data.py parts/* data/prepared

Shards are hard links where the file system has them, so that this takes no space; the parts may be removed after it.
Parts must agree in tokenizer and --seq-length, and share no input file."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", type=Path, metavar="PART_DIR", help="prepared directories")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--force", action="store_true", help="replace OUT_DIR")
    parser.add_argument("--json", action="store_true", help="print the index as JSON")
    args = parser.parse_args(argv)
    from megatron_jet.data.merge import merge
    from megatron_jet.data.progress import PreparationProgress

    with PreparationProgress() as progress:
        index = merge(args.parts, args.out, force=args.force, say=progress.say, watch=progress.update)
    print(json.dumps(index.to_dict(), indent=2) if args.json else index.summary())
    return 0


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(run_tool(main))
