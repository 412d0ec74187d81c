"""The output directory: one writer, made as a whole or not at all, and `--force` replaces earlier outputs only."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_jet.configs.directories import replaced_directory
from megatron_jet.configs.errors import UserError
from megatron_jet.data.index import read_index

INDEX = "index.json"


def check_output(out: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raise UserError when `out` is there already and may not be replaced.

    Args:
        inputs: files and folders that are read.
        force: the user wants an earlier output replaced.
    """
    target = out.resolve()
    if out.exists():
        for path in inputs if force else ():
            if path.resolve().is_relative_to(target):
                raise UserError(f"{out}: the output would replace the input {path}; choose another output")
    check_kind(out, force)
    strangers = sorted(_files_of(target) - _own(target)) if out.exists() else []
    if strangers:
        raise UserError(_refusal(out, f"{strangers[0]} is in it"))


def check_kind(out: Path, force: bool) -> None:
    """The part of `check_output` that takes no time and needs no input: what `out` is, if it is there."""
    target = out.resolve()
    if not target.name:
        raise UserError(f"{out}: give a directory that can be made")
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out} exists; remove it or give --force")
    if not out.is_dir():
        raise UserError(_refusal(out, "it is a file"))
    if any(target.iterdir()) and not (target / INDEX).is_file():
        raise UserError(_refusal(out, f"it has no {INDEX}"))


def _refusal(out: Path, why: str) -> str:
    return f"{out} is not a prepared directory ({why}); --force replaces nothing else"


def _files_of(out: Path) -> set[str]:
    """All files and links in a folder, relative to it."""
    found = set()
    for folder, folders, names in os.walk(out):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found.update(os.path.relpath(os.path.join(folder, name), out) for name in (*names, *links))
    return found


def _own(out: Path) -> set[str]:
    """Files that preparing wrote, by the index. Raises UserError when that is no index of prepared data."""
    if not any(out.iterdir()):
        return set()
    try:
        index = read_index(out)
    except UserError as error:
        raise UserError(_refusal(out, f"its {INDEX} is not one: {error}")) from None
    return {INDEX, *(shard.path for split in index.splits.values() for shard in split.shards)}


@contextlib.contextmanager
def directory_for(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` when the block ends well and is gone when it does not.

    Raises:
        UserError: it cannot be written, or another process writes it.
    """
    target = Path(os.path.realpath(out))  # of a link the folder it names is replaced
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced_directory(target) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where nothing came of it
