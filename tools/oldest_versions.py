#!/usr/bin/env python3
"""Prints pip constraints for the oldest versions that pyproject.toml promises, `name==lower bound` a line.

`make test-oldest` installs them. What has no lower bound there, and what runs the tests, comes from constraints.txt.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = (
    "train",
)  # beside what the project always needs; a GPU's and the launcher's packages promise no range of ours
TEST_TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(\[[^\]]*\])?(?P<bounds>[^;]*)")
LOWER = re.compile(r"(?:>=|==)\s*([0-9][0-9A-Za-z.]*)")


def oldest(requirements: list[str], pins: dict[str, str]) -> dict[str, str]:
    """Version by package: the lower bound, or else the pin, or else nothing.

    Args:
        requirements: as pyproject.toml writes them.
        pins: version by lower-case name, for packages without a bound.
    """
    found = {}
    for requirement in requirements:
        match = REQUIREMENT.match(requirement)
        name, lower = match["name"], LOWER.search(match["bounds"])
        version = lower[1] if lower else pins.get(name.lower())
        if version is not None:
            found[name] = version
    return found


def pinned(text: str) -> dict[str, str]:
    """Version by lower-case name of a constraints file."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    return {name.strip().lower(): version.strip() for name, version in pairs}


def main() -> int:
    """Print the constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    pins = pinned((ROOT / "constraints.txt").read_text())
    versions = oldest([*project["dependencies"], *extras], pins) | {name: pins[name] for name in TEST_TOOLS}
    print("\n".join(f"{name}=={version}" for name, version in versions.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
