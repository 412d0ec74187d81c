#!/usr/bin/env python3
"""PostNAS from the command line: `python launcher/postnas.py run tiny`. All logic is in jet_launcher.

This file alone is read by any Python, so that a wrong one is told what is missing: keep its syntax old.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MINIMUM_PYTHON = (3, 12)
NEEDED = ("typer", "pydantic", "yaml")


def problem():
    """Why this Python cannot run the launcher; None when it can."""
    if sys.version_info < MINIMUM_PYTHON:
        return "this is Python %d.%d" % sys.version_info[:2]  # noqa: UP031
    from importlib.util import find_spec

    missing = [name for name in NEEDED if find_spec(name) is None]
    return "there is no %s" % ", ".join(missing) if missing else None  # noqa: UP031


def start():
    """Run the launcher, or say in one line why it cannot run here. Returns the exit code."""
    found = problem()
    if found:
        message = "error: the launcher needs Python 3.12 and megatron-jet[launch]; %s (%s). "  # noqa: UP031
        hint = "Use the Python of your environment, such as .venv/bin/python, or: pip install -e '.[launch]'"
        sys.stderr.write(message % (found, sys.executable) + hint + "\n")
        return 1
    # Works from a checkout that is not installed, also on a login node without torch.
    sys.path[:0] = [ROOT, os.path.join(ROOT, "launcher")]
    from jet_launcher.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
