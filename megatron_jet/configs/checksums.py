"""Checksums of a checkpoint's files, in checksums.json beside them, and verified before anything is read.

A directory without that file is from before there were checksums and is read as it is.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from megatron_jet.configs.errors import UserError
from megatron_jet.configs.files import hash_file, read_json_object, write_json

CHECKSUMS = "checksums.json"
HASHED_AT_ONCE = 4  # threads; SHA-256 leaves the interpreter free
_VERIFIED: ContextVar[bool] = ContextVar("verified", default=True)


class DamagedError(UserError):
    """A checkpoint whose bytes are not those that were written.

    Attributes:
        path: its directory.
    """

    def __init__(self, message: str, path: Path | None = None):
        super().__init__(message)
        self.path = path


@contextmanager
def verification(wanted: bool) -> Iterator[None]:
    """Inside, checksums are looked at when a checkpoint is opened, or not: hashing a very large one takes minutes."""
    token = _VERIFIED.set(wanted)
    try:
        yield
    finally:
        _VERIFIED.reset(token)


def files_in(directory: Path) -> list[str]:
    """Names of all files below a directory but its checksums, relative to it, the largest first."""
    files = [path for path in directory.rglob("*") if path.is_file() and path != directory / CHECKSUMS]
    sizes = {str(path.relative_to(directory)): path.stat().st_size for path in files}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def hash_files(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 (hex) of some files by name. Raises UserError or OSError for one that is missing or cannot be read."""
    with ThreadPoolExecutor(max_workers=min(HASHED_AT_ONCE, os.cpu_count() or 1)) as threads:
        try:
            return dict(zip(names, threads.map(lambda name: hash_file(directory / name), names)))
        except BaseException:  # a stop does not wait for what has not begun
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def write_checksums(directory: Path, hashes: Mapping[str, str]) -> None:
    """Record what the files of a directory must be."""
    write_json(directory / CHECKSUMS, {"sha256": dict(sorted(hashes.items()))})


def read_checksums(directory: Path) -> dict[str, str] | None:
    """What the files must be; None: not known, or not wanted. Raises DamagedError when the record itself is odd."""
    if not _VERIFIED.get() or not os.path.lexists(directory / CHECKSUMS):
        return None
    try:
        hashes = read_json_object(directory / CHECKSUMS).get("sha256")
    except UserError as error:
        raise DamagedError(f"{error}; the checkpoint is damaged", directory) from None
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise DamagedError(f"{directory / CHECKSUMS}: holds no checksums; the checkpoint is damaged", directory)
    return hashes


def damaged(directory: Path, problem: str) -> DamagedError:
    """The error for a problem that `first_difference` found."""
    if problem.startswith(".metadata"):
        return DamagedError(f"{directory}: checkpoint metadata cannot be read ({problem})", directory)
    return DamagedError(f"{directory}: {problem}; the checkpoint is damaged", directory)


def first_difference(directory: Path, names: Sequence[str], expected: Mapping[str, str]) -> str | None:
    """What is wrong with the first of some files that is not as recorded."""
    for name in names:
        if not (directory / name).is_file():
            return f"{name} is missing"
    try:
        found = hash_files(directory, names)
    except (OSError, UserError) as error:
        return f"cannot be read ({error})"
    return next((f"{name} is not what was written (SHA-256)" for name in names if found[name] != expected[name]), None)


def verify(directory: Path) -> None:
    """Check every file of a checkpoint, in this process alone. Raises DamagedError that names the first bad one."""
    expected = read_checksums(directory)
    if expected is not None:
        _compare(directory, expected)


def verify_export(directory: Path, files: Mapping[str, str]) -> None:
    """Check what a model is loaded from, in an exported directory; its card may have been edited.

    Args:
        directory: the export.
        files: sha256 by file name, as written.

    Raises:
        DamagedError: names the first file that is not what was written.
    """
    if not _VERIFIED.get():
        return
    try:
        _compare(directory, {name: files[name] for name in files if not name.endswith(".md")})
    except DamagedError as error:
        raise DamagedError(str(error).replace("the checkpoint is", "the export is"), directory) from None


def _compare(directory: Path, expected: Mapping[str, str]) -> None:
    problem = first_difference(directory, list(expected), expected)
    if problem is not None:
        raise damaged(directory, problem)
