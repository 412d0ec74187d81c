#!/usr/bin/env python3
"""PostNAS from the command line: `python launcher/postnas.py run tiny`. All logic is in jet_launcher."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Works from a checkout that is not installed, also on a login node without torch.
sys.path[:0] = [str(ROOT), str(ROOT / "launcher")]

from jet_launcher.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
