#!/usr/bin/env python3
"""Fetch what a run needs from a network, on a machine that has one: compute nodes usually have none."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "launcher"), str(ROOT / "kernels")]

from jet_launcher.prefetch import fetch, hub_download, needed  # noqa: E402
from megatron_jet.configs.command_line import run_tool  # noqa: E402
from megatron_jet.configs.overrides import apply_overrides  # noqa: E402
from megatron_jet.configs.recipes.catalog import load_recipe  # noqa: E402
from megatron_jet.configs.teacher_source import expand_paths  # noqa: E402

EXAMPLES = """example:
  JET_TEACHERS=/lustre/teachers JET_DATA=/lustre/data python tools/prefetch.py jet_nemotron_2b
  python tools/prefetch.py jet_nemotron_2b --check      (says what is missing, downloads nothing)
  HF_HOME=/lustre/hf python tools/prefetch.py jet_nemotron_2b --preset paper-mmlu paper-math --tasks lambada_openai

exit codes: 0 everything is there, 1 something is missing or cannot be fetched, 2 usage
"""


def fetch_evaluation(tasks: list[str], presets: list[str]) -> None:
    """Data of harness tasks, into the cache under HF_HOME. The only part that imports torch."""
    from megatron_jet.evaluation.presets import find_preset

    chosen = [find_preset(name) for name in presets]
    from megatron_jet.evaluation.harness import fetch_task_data

    fetch_task_data(tasks, chosen)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="as for `postnas.py run`")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--check", action="store_true", help="only look")
    parser.add_argument("--tasks", metavar="A,B", default="", help="also the data of these harness tasks (eval extra)")
    parser.add_argument("--preset", nargs="+", metavar="NAME", default=[], help="also that of these, as in evaluate.py")
    options = parser.parse_args(arguments)
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    items = needed(expand_paths(apply_overrides(load_recipe(options.recipe), options.overrides)))
    if options.check:
        left = [item for item in items if not item.present]
        for item in items:
            print(f"{item.what}: {item.path} {'is there' if item.present else 'is missing'}")
    else:
        left = fetch(items, hub_download, print)
        if tasks or options.preset:
            fetch_evaluation(tasks, options.preset)
    if not items:
        print(f"{options.recipe} needs nothing from outside")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
