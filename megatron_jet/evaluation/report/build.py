"""Write report.json and report.html of a run: `python -m megatron_jet.evaluation.report.build RUN_DIR`. No torch."""

import sys
from pathlib import Path

from megatron_jet.configs.command_line import run_tool
from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import write_json, write_text
from megatron_jet.evaluation.report.collect import collect
from megatron_jet.evaluation.report.html import render


def build_report(run_dir: Path) -> None:
    """Write both files, from whatever stages have finished.

    Raises:
        UserError: not a run directory, or a result that cannot be read.
    """
    report = collect(run_dir)
    page = render(report)
    write_json(run_dir / "report.json", report)
    write_text(run_dir / "report.html", page)


def main(arguments: list[str]) -> int:
    """Command line. Returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m megatron_jet.evaluation.report.build RUN_DIR", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    run_dir = Path(arguments[0])
    try:
        build_report(run_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {run_dir}: the report cannot be written ({error.strerror or error})", file=sys.stderr)
        return 1
    print(f"report: {run_dir / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
