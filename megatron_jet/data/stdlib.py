"""Text that is on every machine: the source and docstrings of Python's standard library.

Files go to splits by a hash of their path, so that no document is in two splits and the split of a file never depends
on which other files are there.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron_jet.configs.errors import UserError

SPLITS = ("train", "search", "heldout")
EVALUATION_SHARE = 5  # per cent of the documents, each, for search and heldout

# Tests are absent from many distributions of Python; the codec tables are numbers, not text.
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """A file of the standard library: path relative to its root, content and the content's SHA-256 (hex)."""

    path: str
    content: bytes
    sha256: str


def split_of(name: str) -> str:
    """Returns the split of a file of the standard library, which goes by its path."""
    return split_of_digest(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest())


def split_of_digest(digest: str) -> str:
    """Returns the split from an MD5 (hex): 5% search, 5% heldout, the rest train."""
    bucket = int(digest, 16) % 100
    if bucket < EVALUATION_SHARE:
        return "heldout"
    return "search" if bucket < 2 * EVALUATION_SHARE else "train"


def read_stdlib(split: str) -> list[SourceFile]:
    """Reads the standard library's `.py` files of one split, sorted by path.

    Raises:
        UserError: when this Python has no readable standard library on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _EXCLUDED_FOLDERS.intersection(relative.parts) or split_of(relative.as_posix()) != split:
            continue
        content = path.read_bytes()
        if content.strip():
            files.append(SourceFile(relative.as_posix(), content, hashlib.sha256(content).hexdigest()))
    if not files:
        raise UserError(f"{root}: no Python source files for split {split!r}; give text files instead of --stdlib")
    return files
