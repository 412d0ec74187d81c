"""Asking git about a checkout."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 120.0  # seconds; a file system full of small files is slow


@dataclass(frozen=True)
class GitAnswer:
    """What git printed, and why it failed in one line ("" when it did not)."""

    output: bytes
    error: str

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")


def ask_git(root: Path, *arguments: str) -> GitAnswer:
    """Output of `git ARGUMENTS` in the checkout `root`."""
    # git refuses a checkout of another user (a shared one, one in a container). We run its code anyway, so trust it;
    # git before 2.38 takes this from no command line and keeps refusing.
    command = ["git", "-c", f"safe.directory={root.resolve()}", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return GitAnswer(b"", f"git {arguments[0]}: no answer within {TIMEOUT:.0f} s")
    except OSError as error:
        return GitAnswer(b"", f"git: {error.strerror or error}")
    if done.returncode == 0:
        return GitAnswer(done.stdout, "")
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return GitAnswer(done.stdout, lines[0] if lines else f"git {arguments[0]} ended with {done.returncode}")
