#!/usr/bin/env python3
"""Train the tiny teacher from random weights on one CPU core, score it, and write it as a Hugging Face directory."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_jet.configs.command_line import run_tool, seed  # noqa: E402
from megatron_jet.configs.errors import UserError  # noqa: E402
from megatron_jet.configs.files import describe_os_error  # noqa: E402
from megatron_jet.configs.lock import exclusive  # noqa: E402

EXAMPLE = """example:
  OMP_NUM_THREADS=1 python tools/train_teacher.py runs/teacher --minutes 50
  python tools/train_teacher.py runs/teacher --minutes 50 --resume

OUT_DIR gets checkpoints/ and curve.jsonl while it trains, and model/ at the end (or with --publish, at any time)."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--minutes", type=float, default=50, metavar="N", help="processor time (default 50)")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="of weights and batches (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT_DIR's last checkpoint")
    parser.add_argument("--publish", action="store_true", help="write model/ from the last checkpoint, train nothing")
    parser.add_argument("--note", default="", metavar="TEXT", help="a remark on the run for the model's card")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < float("inf"):
        parser.error("--minutes must be above 0")

    import torch

    from megatron_jet.teacher.train import TeacherRun, load_teacher, train_teacher

    torch.set_num_threads(1)
    run = TeacherRun(args.out, args.minutes, args.seed)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(describe_os_error(error, args.out)) from None
    with exclusive(args.out / ".lock", "wait for it to end, or choose another OUT_DIR"):
        if args.publish:
            model = load_teacher(run)
        else:
            model = train_teacher(run, resume=args.resume, log=lambda line: print(line, flush=True))
        return publish_model(args, model)


def publish_model(args: argparse.Namespace, model) -> int:
    """Write model/ and print its scores."""
    from megatron_jet.teacher.publish import Origin, publish

    command = f"python tools/train_teacher.py OUT_DIR --minutes {args.minutes:g} --seed {args.seed}"
    source = Origin(command, args.seed, args.note)
    scores = publish(model, args.out / "curve.jsonl", args.out / "model", source)
    for name, loss in scores["heldout"]["loss"].items():
        accuracy = scores["heldout"]["accuracy"].get(name)
        print(f"held-out {name}: loss {loss:.3f}" + ("" if accuracy is None else f", accuracy {accuracy:.3f}"))
    print(f"teacher: {args.out / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
